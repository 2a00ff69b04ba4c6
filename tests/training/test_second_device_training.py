"""Training on a device that is not the CPU: nothing is left behind on the CPU, and a step waits for it once."""

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch


pytest.importorskip("second_device", exc_type=ImportError, reason="this torch cannot be given a device from Python")

from accelerate import PartialState
from accelerate.state import AcceleratorState
from rounding import CURVE
from safetensors.torch import load_file
from second_device import DEVICE, second_device, waits_counted

from training.outputs.checkpoints import checkpoint_folders
from training.settings.config import TrainConfig
from training.trainer import Trainer
from transdiff_pipelines import TransDiffPipeline


def train(config: TrainConfig, on_device: bool) -> Trainer:
    """A whole run, on the CPU or on the other device."""
    AcceleratorState._reset_state(reset_partial_state=True)
    device = DEVICE if on_device else torch.device("cpu")
    with second_device(), mock.patch.object(PartialState, "default_device", device):
        trainer = Trainer(config)
        trainer.run()
    assert trainer.accelerator.device == device
    return trainer


def logged(config: TrainConfig, name: str, file: str = "metrics.jsonl") -> list[float]:
    return [json.loads(line)[name] for line in (Path(config.output) / file).read_text().splitlines()]


# The first steps of Adam are as long as the learning rate whatever the gradient's size, so its rounding in bfloat16
# decides where some weights go: with a tenth of the learning rate, that moves the losses a tenth as far.
BF16 = {"mixed_precision": "bf16", "optimizer.learning_rate": 1e-3}
RUNS = {
    "1-step": {},
    "MRAR": {"model.patch_size": 2},
    "dropout, accumulation": {"model.dropout": 0.3, "optimizer.gradient_accumulation": 2},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "images": {"data.cache": None},
    "bf16": BF16,
    "bf16, images": {**BF16, "data.cache": None},
    "Muon": {"optimizer.kind": "muon"},
}
REPORTED = {"validation.fraction": 0.3, "validation.every": 2, "preview.every": 4, "preview.num_inference_steps": 1}


def compare(configs: list[TrainConfig], name: str) -> None:
    """Runs on the CPU and on the device, with validation, previews, checkpoints and the finished pipeline."""
    tolerance = 3e-2 if "bf16" in name else CURVE  # the device's autocast rounds in other places than the CPU's
    for config, on_device in zip(configs, (False, True), strict=True):
        train(config, on_device)
    for values, file in (("loss", "metrics.jsonl"), ("validation_loss_ema", "validation.jsonl")):
        expected, found = (logged(config, values, file) for config in configs)
        assert found == pytest.approx(expected, rel=tolerance)
    assert (Path(configs[1].output) / "previews" / "step-00000004.png").exists()


@pytest.mark.parametrize("name", RUNS)
def test_a_run_gives_the_cpu_s_losses(make_config, data_config, name: str) -> None:
    changes = {**RUNS[name], **REPORTED, "data.images": data_config.images}
    configs = [make_config(output, **changes) for output in ("cpu", "elsewhere")]
    compare(configs, name)
    pipe = TransDiffPipeline.from_pretrained(Path(configs[1].output) / "pipeline")
    averaged = load_file(checkpoint_folders(Path(configs[1].output))[-1] / "state" / "ema.safetensors")
    assert torch.equal(pipe.transformer.proj_out.weight, averaged["transformer.proj_out.weight"])


@pytest.mark.parametrize("changes", [{}, {"model.patch_size": 1}, BF16], ids=str)
def test_a_flow_map(flow_map_config, changes: dict) -> None:
    settings = {"patch_size": changes.get("model.patch_size", 2)} | REPORTED | changes
    compare([flow_map_config(output, **settings) for output in ("cpu", "elsewhere")], str(changes))


def test_lora(make_config) -> None:
    base = make_config("base", **{"schedule.steps": 1})
    train(base, on_device=True)
    settings = {f"model.{name}": None for name in base.model.sizes()}
    settings |= {"model.start_from": f"{base.output}/pipeline", "lora.rank": 2, **REPORTED}
    compare([make_config(output, **settings) for output in ("cpu", "elsewhere")], "LoRA")


def test_a_resumed_run_is_bit_identical_to_one_that_went_through(make_config) -> None:
    options = {"model.dropout": 0.3, "mixed_precision": "bf16", "checkpoints.keep": 3}
    whole, killed = make_config("whole", **options), make_config("killed", **options)
    train(whole, on_device=True)
    shutil.copytree(whole.output, killed.output)  # as after a kill before step 4, with step 2 as the last save
    for path in (*checkpoint_folders(Path(killed.output))[1:], Path(killed.output) / "pipeline"):
        shutil.rmtree(path)
    train(killed, on_device=True)
    assert logged(killed, "loss") == logged(whole, "loss")
    first, second = (
        load_file(checkpoint_folders(Path(config.output))[-1] / "state" / "model.safetensors")
        for config in (whole, killed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def trainer(make_config, data_config, request) -> Iterator[Trainer]:
    """A run on the device, about to take its first step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with second_device(), mock.patch.object(PartialState, "default_device", DEVICE):
        yield Trainer(make_config(**request.param, **{"data.images": data_config.images}))


WAITING_RUNS = [
    {},
    {"model.patch_size": 2},
    {"data.cache": None},
    {"mixed_precision": "bf16"},
    {"optimizer.kind": "adamw"},
    {"optimizer.kind": "muon"},
]


@pytest.mark.parametrize("trainer", WAITING_RUNS, indirect=True, ids=str)
def test_a_step_waits_for_the_device_once(trainer: Trainer) -> None:
    """When it reads the gradients' norm, which decides whether to step at all, and with it the losses."""
    for index in range(3):
        with waits_counted() as waits:
            losses, _ = trainer.train_step([trainer.batches[index]])
        assert len(waits) == 1, "\n".join(waits)
        assert losses.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trainer", [{}, {"model.patch_size": 2}], indirect=True, ids=str)
def test_autocast(trainer: Trainer, dtype: torch.dtype) -> None:
    """Losses and gradients come out in float32, and near those of float32."""
    batch = trainer.to_latents(trainer.batches[0])
    expected = trainer.module(**batch)
    with torch.autocast("elsewhere", dtype):
        losses = trainer.module(**batch)
    losses.mean().backward()
    assert losses.dtype == torch.float32
    assert losses.tolist() == pytest.approx(expected.tolist(), rel=3e-2)
    gradients = [value.grad for value in trainer.module.parameters() if value.grad is not None]
    assert all(gradient.dtype == torch.float32 and bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("trainer", [{}, {"mixed_precision": "bf16"}], indirect=True, ids=str)
def test_a_bad_step_is_skipped(trainer: Trainer) -> None:
    trainer.train_step([trainer.batches[0]])
    before = [value.cpu() for value in (*trainer.module.parameters(), *trainer.ema.average.shadow_params)]
    bad = trainer.batches[1]
    losses, norm = trainer.train_step([{**bad, "latents": bad["latents"] * float("inf")}])
    assert not losses.isfinite().any()
    assert not math.isfinite(norm)
    assert (trainer.step, trainer.skipped, trainer.ema.average.optimization_step) == (2, 1, 1)
    after = [value.cpu() for value in (*trainer.module.parameters(), *trainer.ema.average.shadow_params)]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
