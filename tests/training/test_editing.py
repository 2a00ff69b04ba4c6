"""The editing demonstration: what its measures must say whatever the model, on a tiny untrained one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from pictures import size_of

from training.digits import editing
from training.digits.export import main as export_digits
from training.digits.quality import Reference, load_split
from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "digits"
    export_digits(["--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def pipeline() -> TransDiffPipeline:
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2, "attention_head_dim": 4}
    vae = AutoencoderKL(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=2,
        latent_channels=4,
        layers_per_block=1,
    )
    encoder = ARConditionEncoder(
        num_classes=10, sample_size=4, in_channels=4, patch_size=2, num_class_tokens=1, num_layers=1, **heads
    )
    transformer = TransDiffTransformer2DModel(
        sample_size=4, in_channels=4, num_layers=1, cross_attention_dim=8, **heads
    )
    return TransDiffPipeline(encoder, transformer, vae.eval(), FlowMatchEulerMaruyamaScheduler())


@pytest.fixture(scope="module")
def real(digits: Path) -> tuple[Reference, np.ndarray, np.ndarray]:
    images, labels = load_split(digits, "validation")
    return Reference(digits, "validation"), images, labels


def test_bands_cover_a_third_at_every_height() -> None:
    masks = editing.band_masks(400, seed=0)
    assert np.unique(masks.sum(axis=(1, 2))).tolist() == [11 * 32]
    assert masks.any(axis=(0, 2)).all()
    assert (masks == masks[..., :1]).all()
    np.testing.assert_array_equal(masks, editing.band_masks(400, seed=0))


def test_unchanged_digits_are_at_no_distance_and_recognised(real: tuple) -> None:
    reference, images, labels = real
    threes = images[labels == 3]
    (row,) = editing.measure_swaps(reference, threes, threes[None])
    assert row["distance"] == 0
    assert row["source"] > 0.9
    assert row["target"] < 0.1


def test_seam_is_the_step_at_the_band_s_edges(real: tuple) -> None:
    reference, images, labels = (real[0], real[1][:4], real[2][:4])
    masks = editing.band_masks(4, seed=0)
    flat, stepped = np.zeros_like(images), np.broadcast_to(0.25 * masks[..., None], images.shape)
    measured = [editing.measure_restoration(reference, images, masks, labels, x)["seam"] for x in (flat, stepped)]
    assert measured == [0, 0.25]


def test_swaps_start_at_the_vae_s_image_and_forget_it_at_the_end(pipeline: TransDiffPipeline, real: tuple) -> None:
    images = real[1][:2]
    swapped = editing.swap_classes(pipeline, images, (0.0, 0.5, 1.0), seed=0, num_inference_steps=2)
    other = editing.swap_classes(pipeline, 1 - images, (0.0, 0.5, 1.0), seed=0, num_inference_steps=2)
    assert swapped.shape == (3, 2, 32, 32, 3)
    np.testing.assert_array_equal(swapped[2], other[2])
    assert not np.array_equal(swapped[1], other[1])


def test_restored_digits_keep_what_is_known(pipeline: TransDiffPipeline, real: tuple) -> None:
    reference, images, labels = (real[0], real[1][:3], real[2][:3])
    masks = editing.band_masks(3, seed=0)
    masked = images * (1 - masks[..., None])
    restored, raw = editing.restore(pipeline, masked, masks, labels, seed=0, num_inference_steps=2)
    measured = editing.measure_restoration(reference, images, masks, labels, restored)
    assert measured["known_error_max"] == measured["known_error_rms"] == 0
    assert measured["unknown_error_rms"] > 0
    np.testing.assert_array_equal(restored[masks == 1], raw[masks == 1])
    assert editing.measure_restoration(reference, images, masks, labels, raw)["known_error_rms"] > 0


def test_command_line(
    pipeline: TransDiffPipeline, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    pipeline.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(editing, "STRENGTHS", (0.0, 1.0))
    monkeypatch.setattr(
        editing, "RESAMPLING", {"straight through": {}, "resampled": {"jump_length": 1, "jump_n_sample": 2}}
    )
    options = ["--model", tmp_path / "model", "--data", digits, "--output", tmp_path / "result.json"]
    options += ["--pictures", tmp_path / "pictures", "--seeds", 0, "--num-inference-steps", 2]
    editing.main([str(option) for option in options])
    result = json.loads((tmp_path / "result.json").read_text())
    assert [row["strength"] for row in result["swap"]] == [0.0, 1.0]
    named = {row["images"]: row["mean"] for row in result["restoration"]}
    assert named["original"]["recognition"] > 0.9
    assert named["masked"]["recognition"] < named["original"]["recognition"]
    assert named["resampled"]["known_error_max"] == 0
    assert "| strength | recognised as 8, %" in capsys.readouterr().out
    assert size_of(tmp_path / "pictures" / "editing_restoration.png") == (20 * 66, 4 * 66)
    assert size_of(tmp_path / "pictures" / "editing_swap.png") == (3 * 66, 8 * 66)
