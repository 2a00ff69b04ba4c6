import re
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from training.settings.config import to_dict
from training.trainer import Trainer


def test_a_finished_run_leaves_a_card_with_its_samples_and_losses(make_config) -> None:
    config = make_config(**{"schedule.steps": 4, "log_every": 1, "preview.every": 2, "preview.labels": [0, 1]})
    folder = Trainer(config).run()
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "diffusers"
    for picture in ("samples.png", "loss.png"):
        assert f"({picture})" in card.text
        assert (folder / picture).stat().st_size > 0
    assert (folder / "samples.png").read_bytes() == (Path(config.output) / "previews/step-00000004.png").read_bytes()
    configuration = re.search(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    assert yaml.safe_load(configuration[1]) == to_dict(config)
    assert "| 4 |" in card.text
