"""The paper's experiments as commands; docs/experiments.md shows what they give on digits."""
