"""The emoji recipe of all classes, 1-step and MRAR, in the time that is left: how far it comes, and a picture."""

import contextlib
import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler
from diffusers.utils import make_image_grid

from training.settings.config import TrainConfig, load_config
from training.trainer import Trainer
from transdiff_pipelines import TransDiffPipeline

from ..common.parts import Part, Skip
from ..common.report import markdown_table
from .common import Shared


CONFIGS = Path(__file__).parents[2] / "training" / "configs"
ONE_STEP, MRAR = "emoji_all_1step", "emoji_all_mrar"
SHARES = {ONE_STEP: 0.55, MRAR: 0.6}
"""What each stage takes of the time that is left when it begins; the rest is for loading, saving and the picture."""
TRIAL_STEPS = 40
SHEET_CLASSES, SHEET_COLUMNS = 96, 16


def quick(config: TrainConfig, output: Path, steps: int) -> TrainConfig:
    """The same training in so many steps: nothing is reported or saved on its way."""
    warmup = config.schedule.warmup_steps
    schedule = replace(config.schedule, steps=steps, warmup_steps=None if warmup is None else min(warmup, steps // 10))
    quiet: dict[str, Any] = {
        "preview": replace(config.preview, every=None),
        "checkpoints": replace(config.checkpoints, every=max(steps, 1)),
        "log_every": min(config.log_every, max(steps // 2, 1)),
    }
    return replace(config, output=str(output), schedule=schedule, trackers=[], **quiet)


def run(config: TrainConfig) -> tuple[Trainer, dict[str, float]]:
    """Train from the beginning, what it says going to a file of its folder; the trainer and its last logged line."""
    folder = Path(config.output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with (
        (folder / "log.txt").open("w", encoding="utf-8") as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        trainer = Trainer(config)
        trainer.run()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return trainer, json.loads(lines[-1])


def train_within(config: TrainConfig, output: Path, seconds: float) -> dict[str, Any]:
    """Train as many of the configured steps as fit into `seconds`, by the speed of a short trial; a row of the result.

    The learning rate's schedule ends with the steps that fit. The pipeline is in `output`/pipeline.
    """
    began, configured = time.monotonic(), config.schedule.steps
    assert configured is not None  # the emoji's configurations count steps, not epochs
    trial = output.with_name(f"{output.name}_trial")
    trainer, logged = run(quick(config, trial, min(TRIAL_STEPS, configured)))
    shutil.rmtree(trial)
    images = trainer.groups_per_step * trainer.batches.group_size
    left = seconds - (time.monotonic() - began)
    steps = max(1, min(configured, int(left * logged["images_per_second"] / images)))
    _, logged = run(quick(config, output, steps))
    return {
        "steps": steps,
        "configured_steps": configured,
        "images_per_step": images,
        "images_per_second": logged["images_per_second"],
        "loss": logged["loss"],
    }


@torch.no_grad()
def draw_sheet(folder: Path, device: torch.device) -> None:
    """The first picture of evenly spread classes of the pipeline in `folder`, as `folder`.png."""
    pipe = TransDiffPipeline.from_pretrained(folder / "pipeline").to(device)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    number = pipe.condition_encoder.config.num_classes
    count = min(number, SHEET_CLASSES) // SHEET_COLUMNS * SHEET_COLUMNS or number
    labels = torch.linspace(0, number - 1, count).long().tolist()
    images = pipe(labels, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    columns = min(SHEET_COLUMNS, count)
    make_image_grid(images, rows=count // columns, cols=columns).save(folder.with_suffix(".png"))


def train_emoji(shared: Shared) -> dict[str, Any]:
    """Both stages, to OUTPUT_emoji_all_1step and OUTPUT_emoji_all_mrar, and a picture of each.

    Raises:
        Skip: the cache of latents is not there, or this is a rehearsal.
    """
    if shared.tiny:
        raise Skip("a rehearsal does not train; tests/training/test_emoji_on_gpu.py does, with tiny models")
    rows = []
    for name, share in SHARES.items():
        config = load_config([f"--config={CONFIGS / name}.yaml"])
        cache = config.data.cache
        if cache is None or not Path(cache).is_dir():
            raise Skip(
                f"there is no {cache}: python -m training.cache_latents --config training/configs/{name}.yaml makes "
                f"it, on any machine; bring it and {config.data.vae} along"
            )
        output = shared.output.with_name(f"{shared.output.name}_{name}")
        if name == MRAR:
            start = shared.output.with_name(f"{shared.output.name}_{ONE_STEP}") / "pipeline"
            config = replace(config, model=replace(config.model, start_from=str(start)))
        rows.append({"name": name} | train_within(config, output, share * shared.deadline.left))
        draw_sheet(output, shared.device)
    return {"rows": rows}


def emoji_table(result: dict[str, Any]) -> str:
    head = ["configuration", "steps (configured)", "images a step", "images per second", "last loss"]
    rows = [
        [
            row["name"],
            f"{row['steps']:,} ({row['configured_steps']:,})",
            row["images_per_step"],
            f"{row['images_per_second']:,.0f}",
            f"{row['loss']:.3f}",
        ]
        for row in result["rows"]
    ]
    return markdown_table(head, rows)


EMOJI = Part("emoji", "How far does the emoji recipe come in the time that is left?", 120, train_emoji, emoji_table)
