"""The emoji part of `make gpu`: as many steps as fit into the time, in two stages, on tiny models and data."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.common.parts import Deadline, Skip
from benchmarks.on_gpu import emoji
from benchmarks.on_gpu.common import Shared
from transdiff_pipelines import TransDiffPipeline


def shared(output: Path, minutes: float) -> Shared:
    return Shared(torch.device("cpu"), False, None, Deadline(minutes), output)


def test_both_stages(make_config, tmp_path, monkeypatch) -> None:
    configs = {
        emoji.ONE_STEP: make_config(**{"schedule.steps": 3}),
        emoji.MRAR: make_config(**{"schedule.steps": 2, "model.patch_size": 2, "data.batch_size": 1}),
    }
    for name in ("encoder_layers", "decoder_layers", "num_attention_heads", "attention_head_dim", "num_class_tokens"):
        setattr(configs[emoji.MRAR].model, name, None)
    monkeypatch.setattr(emoji, "load_config", lambda arguments: configs[Path(arguments[0]).stem])
    result = emoji.train_emoji(shared(tmp_path / "gpu", minutes=10))
    assert [(row["name"], row["steps"], row["images_per_step"]) for row in result["rows"]] == [
        (emoji.ONE_STEP, 3, 4), (emoji.MRAR, 2, 4),
    ]  # fmt: skip
    for name, images in ((emoji.ONE_STEP, 1), (emoji.MRAR, 4)):
        pipe = TransDiffPipeline.from_pretrained(tmp_path / f"gpu_{name}" / "pipeline")
        assert pipe.condition_encoder.num_images == images
        with Image.open(tmp_path / f"gpu_{name}.png") as sheet:
            assert sheet.size == (3 * 16, 16)
    assert not list(tmp_path.glob("*_trial"))
    assert f"| {emoji.MRAR} | 2 (2) | 4 |" in emoji.emoji_table(result)


def test_steps_are_cut_to_the_time(make_config, tmp_path) -> None:
    row = emoji.train_within(make_config(**{"schedule.steps": 100_000}), tmp_path / "run", seconds=0.0)
    assert (row["steps"], row["configured_steps"]) == (1, 100_000)


def test_without_a_cache_it_says_how_to_make_one(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Skip, match="no outputs/emoji_latents: python -m training.cache_latents --config"):
        emoji.train_emoji(shared(tmp_path / "gpu", minutes=1))
