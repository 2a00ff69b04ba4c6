"""Outputs: a run's weights and numbers come in, files and reports go out.

`checkpoints` are written so that what has the final name is complete. `reports` are what a run tells while it goes on:
`metrics` (metrics.jsonl, pictures, speed), `validation` (the loss on held-out images) and `trackers` (TensorBoard and
others). `export` writes the finished pipeline, `card` its model card, and `publish` uploads both.
"""
