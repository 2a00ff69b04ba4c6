"""Training steps in bfloat16: ours beside the released code's, and with the state split over a single process."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import Accelerator

from training.distributed.engine import Engine
from training.model.ema import WeightAverage
from training.outputs.metrics import Stopwatch
from training.settings.config import TrainConfig, build
from training.trainer import ENGINES

from ..common.parts import Part, Skip, attempt
from ..common.peers import random_components
from ..common.report import markdown_table, significant
from ..training import Draws, Step, StepSetting, measure_steps, steps_side_by_side, training_model
from .common import HALF, Shared


GROUPS = {"transdiff_b": 32, "transdiff_l": 16}
"""Groups of a step: ours twice, compiled and not, and the released code fit into 80 GB together."""


def step_setting(shared: Shared, name: str) -> StepSetting:
    groups = 2 if shared.tiny else GROUPS[name]
    return StepSetting(shared.model(name), groups, shared.device, HALF, "fused", ("off", "on"))


def steps(shared: Shared, name: str) -> dict[str, Any]:
    """Our step, uncompiled and with compiled blocks, beside the released code's."""
    setting = step_setting(shared, name)
    measured = steps_side_by_side(setting, shared.reference, 2 * shared.rounds)
    return measured | {
        "model": name,
        "images": setting.batch_size * setting.model.num_images,
        "matrix_product_rate": shared.rate,
    }


class EngineStep(Step):
    """A step as the training loop makes it, by one of its engines."""

    def __init__(self, engine: Engine):
        self.engine, self.module, self.network = engine, engine.module, engine.module.transformer
        self.watch, self.optimizer = Stopwatch(engine.accelerator.device), engine.optimizer
        self.average = WeightAverage(engine.module, decay=0.9999)
        self.averages = self.average.average.shadow_params
        engine.model.train()

    def __call__(self, draws: Draws) -> None:
        self.watch.clear()
        batch = draws.batch() | {"noise": torch.randn_like(draws.noise)}
        with self.engine.accumulating(), self.watch.timing("passes"):
            with self.engine.accelerator.autocast():
                losses = self.engine.model(**batch)
            self.engine.backward(losses.mean())
        self.engine.step()
        self.average.update()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    try:
        with mock.patch.dict(os.environ, LOCAL_RANK="0"):  # DeepSpeed asks for it
            yield
    finally:
        dist.destroy_process_group()


def check_engine(sharding: str, device: torch.device) -> None:
    """Raise `Skip` where the engine's library is missing."""
    if sharding != "zero2":
        return
    if find_spec("deepspeed") is None:
        raise Skip("deepspeed is not installed")
    if device.type == "cpu":
        import deepspeed

        # It would compile a faster way to communicate between processes on one CPU, for a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def run_config(setting: StepSetting, sharding: str) -> TrainConfig:
    """The configuration of a run, as far as an engine reads it; its folders are never opened."""
    size = setting.model.size
    sizes = {
        "encoder_layers": size.encoder_layers,
        "decoder_layers": size.decoder_layers,
        "num_attention_heads": size.num_attention_heads,
        "attention_head_dim": size.attention_head_dim,
        "num_class_tokens": 64,
    }
    data = {"cache": "none", "vae": "none", "batch_size": setting.batch_size}
    tree = {"output": "none", "model": sizes, "data": data, "mixed_precision": "bf16", "sharding": sharding}
    tree["schedule"] = {"steps": 1}
    return build(TrainConfig, tree)


def sharded_steps(shared: Shared) -> dict[str, Any]:
    """The engines of the training loop in one process: what splitting costs where there is nothing to split with."""
    setting = step_setting(shared, "transdiff_b")
    draws = Draws(setting.model, setting.batch_size, shared.device)
    accelerator = Accelerator(mixed_precision="bf16", cpu=shared.device.type == "cpu")
    results: dict[str, Any] = {}

    def measured(sharding: str) -> dict[str, Any]:
        check_engine(sharding, shared.device)
        module = training_model(*random_components(setting.model, device=shared.device), setting.model)
        with process_group(shared.device) if sharding != "no" else nullcontext():
            step = EngineStep(ENGINES[sharding](module, run_config(setting, sharding), accelerator))
            (row,) = measure_steps({sharding: step}, draws, 2 * shared.rounds)
        return row

    for sharding in ENGINES:
        results[sharding] = attempt(partial(measured, sharding))
    return {"engines": results, "images": setting.batch_size}


def steps_table(result: dict[str, Any]) -> str:
    header = [
        "step", "images", "s (median)", "images a second", "outside the passes", "of the matrix-product rate",
        "state, GB", "working memory, GB", "over ours: time",
    ]  # fmt: skip
    rows = [
        [
            row["name"], result["images"], *speed_cells(row, result["images"]),
            f"{row['flops'] / row['median_seconds'] / result['matrix_product_rate']:.1%}",
            *memory_cells(row), f"{row['ratio_seconds']['median']:.2f}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    text = markdown_table(header, rows)
    if result["loss"] is not None:
        difference = result["loss"]["relative_difference"]
        text += f"\nThe same weights, noise and timesteps without dropout: losses differ by {difference:.1e}.\n"
    return text


def speed_cells(row: dict[str, Any], images: int) -> list[str]:
    median = row["median_seconds"]
    return [significant(median), significant(images / median), f"{row['outside_fraction']:.1%}"]


def memory_cells(row: dict[str, Any]) -> list[str]:
    return [significant(row["state_bytes"] / 1e9), significant(row["working_bytes"] / 1e9)]


def engines_table(result: dict[str, Any]) -> str:
    header = ["sharding", "s (median)", "images a second", "outside the passes", "state, GB", "working memory, GB"]
    rows = [
        [name, row["reason"], *["—"] * 4]
        if "reason" in row
        else [name, *speed_cells(row, result["images"]), *memory_cells(row)]
        for name, row in result["engines"].items()
    ]
    return markdown_table(header, rows)


def training_part(suffix: str, name: str, seconds: float, rehearsed: bool = True) -> Part:
    question = f"How many images a second does {name} train, beside the released code's step?"
    return Part(f"training_{suffix}", question, seconds, lambda shared: steps(shared, name), steps_table, rehearsed)


BASE = training_part("b", "transdiff_b", 45)
LARGE = training_part("l", "transdiff_l", 60, rehearsed=False)
SHARDING = Part(
    "sharding", "What do FSDP2 and ZeRO-2 cost in one process, beside none?", 60, sharded_steps, engines_table
)
