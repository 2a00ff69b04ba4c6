"""Checkpoints of a run: written under a temporary name and renamed, so that what has the final name is complete.

OUTPUT/checkpoints/step-00001000/
    pipeline/          the averaged weights as a TransDiffPipeline, ready for from_pretrained
    state/             model.safetensors, ema.safetensors (raw and averaged weights), optimiser (accelerate's format)
    progress.json      step, skipped steps, global batch, the resolved configuration

A LoRA run has lora/ in place of pipeline/, and its adapters alone in state/.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from training.data.latent_cache import write_json
from training.settings.config import ConfigError, TrainConfig, build, to_dict


class CheckpointError(ValueError):
    """A checkpoint that is missing, cannot continue this run, or cannot be written."""


class BrokenCheckpointError(CheckpointError):
    """A checkpoint that cannot be read: the one before it may be good."""


# What a full disk makes of writing, and a file that is truncated or something else of reading.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, EOFError, pickle.UnpicklingError)


# Settings that may change when a run goes on; any other difference would make it a different run. The global batch may
# be cut into other batches and processes: its size is compared instead.
FREE_ON_RESUME = (
    "output",
    "resume",
    "log_every",
    "checkpoints.",
    "preview.",
    "validation.cache",
    "validation.every",
    "validation.images",
    "trackers",
    "project",
    "push_to_hub",
    "schedule.",
    "sampling.",
    "data.workers",
    "data.images",
    "data.dataset",
    "data.subset",
    "data.split",
    "data.streaming",
    "data.image_column",
    "data.label_column",
    "data.classes",
    "data.min_side",
    "data.encode_batch_size",
    "data.batch_size",
    "optimizer.max_bad_steps",
    "optimizer.gradient_accumulation",
    "optimizer.global_batch_size",
    "gradient_checkpointing",
    "compile",
    "sharding",
)


# Settings that say where something lies: it may lie elsewhere now, under another name or on another machine.
PLACES = ("data.cache", "data.vae", "model.start_from")


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def checkpoint_path(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return output / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(output: Path, resume: str) -> list[Path]:
    """The checkpoints that `resume` (auto, latest, never or a path) means for the run in `output`, best first.

    The second and later ones are for the case that the first cannot be read; none is a start from the beginning.

    Raises:
        CheckpointError: if it does not exist, or if `never` meets a folder with checkpoints.
    """
    existing = checkpoint_folders(output)
    if resume == "never":
        if existing:
            raise CheckpointError(
                f"{output} already has checkpoints (the latest is {existing[-1].name}); "
                "continue with --resume=latest, or choose another output folder"
            )
        return []
    if resume in ("auto", "latest"):
        if not existing and resume == "latest":
            raise CheckpointError(f"--resume=latest, but {output / 'checkpoints'} has no complete checkpoint")
        return existing[::-1]
    path = Path(resume)
    if not (path / "progress.json").is_file():
        raise CheckpointError(f"--resume={resume}: no such checkpoint; give auto, latest, never or a step-... folder")
    return [path]


def all_processes(accelerator: Accelerator, fine: bool) -> bool:
    """Whether things are fine on every process; all call this together."""
    return bool(accelerator.gather(torch.tensor([fine], device=accelerator.device)).all())


def resume_from(accelerator: Accelerator, candidates: list[Path], load: Callable[[Path], None]) -> dict[Path, str]:
    """Load the first of the candidates that can be read, on all processes the same; returns why others cannot be.

    Raises:
        CheckpointError: if none can be read.
    """
    broken: dict[Path, str] = {}
    for path in candidates:
        problem = "another process cannot read it"
        try:
            load(path)
            fine = True
        except BrokenCheckpointError as error:
            fine, problem = False, str(error)
        if all_processes(accelerator, fine):
            return broken
        broken[path] = problem
    raise CheckpointError(f"no checkpoint can be read: {'; '.join(broken.values())}")


def set_aside(output: Path, step: int, broken: Collection[Path]) -> list[str]:
    """Give the checkpoints after `step` other names, so that none is taken for one of the run that goes on from there:
    broken-step-..., or abandoned-step-... if they can be read. Returns a line on each.
    """
    lines = []
    for path in checkpoint_folders(output):
        if int(path.name.removeprefix("step-")) > step:
            name = f"{'broken' if path in broken else 'abandoned'}-{path.name}"
            shutil.rmtree(path.with_name(name), ignore_errors=True)
            path.rename(path.with_name(name))
            lines.append(f"{path.name} is now called {name}: the run goes on from step {step}")
    return lines


def remove_leftovers(output: Path) -> None:
    """Delete what runs that were killed have left half-written."""
    for path in (output / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save_checkpoint(
    accelerator: Accelerator, output: Path, progress: dict[str, Any], save_weights: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of `progress["step"]`, then delete all but the latest `keep`.

    Args:
        accelerator: holds the prepared model and optimiser; all processes call this together.
        progress: what progress.json will hold.
        save_weights: called by all processes, writes weights, averages and pipeline into a folder on the main one.
        keep: how many checkpoints stay.

    Raises:
        CheckpointError: if it cannot be written, for instance because the disk is full; the others stay.
    """
    final = checkpoint_path(output, progress["step"])
    partial = final.with_name(f".{final.name}.partial")
    main = accelerator.is_main_process

    def make_folder() -> None:
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)

    def put_in_place() -> None:
        if main:
            write_json(partial / "progress.json", progress)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    # After each part all processes agree whether to go on: one that fails must not leave the others in a gather.
    parts = [make_folder, lambda: accelerator.save_state(str(partial / "state")), lambda: save_weights(partial)]
    for part in [*parts, put_in_place]:
        problem = None
        try:
            part()
        except WRITE_ERRORS as error:
            problem = error
        if not all_processes(accelerator, problem is None):
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"{final} cannot be written ({problem or 'by another process'})") from problem
    if main:
        for old in checkpoint_folders(output)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def read_progress(
    checkpoint: Path, config: TrainConfig, groups_per_step: int, origins: dict[str, str]
) -> dict[str, Any]:
    """progress.json of a checkpoint, checked against the configuration of the run that wants to continue it.

    Args:
        groups_per_step: the run's global batch, over all processes.
        origins: digests of what it trains on and starts from, by name.

    Raises:
        BrokenCheckpointError: if it cannot be read.
        CheckpointError: naming every setting that differs and may not.
    """
    try:
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        settings = to_dict(build(TrainConfig, progress["config"]))  # settings that were not there yet have defaults
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint} was written by another version: {error}") from None
    except READ_ERRORS as error:
        raise BrokenCheckpointError(f"{checkpoint / 'progress.json'} cannot be read ({error!r})") from error
    differing = settings_that_differ(settings, to_dict(config))
    if progress.get("groups_per_step", groups_per_step) != groups_per_step:
        differing.append(
            f"the global batch (data.batch_size x processes x accumulation) was {progress['groups_per_step']}, "
            f"now {groups_per_step}"
        )
    before = progress.get("origins", {})
    differing += [f"the {name} were others" for name in origins if before.get(name, origins[name]) != origins[name]]
    if differing:
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(differing)}. Set them back, or choose "
            "another output folder (to start from its weights: --model.start_from=.../pipeline)"
        )
    return progress


def settings_that_differ(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A phrase for each setting that differs and may not. What lies at a path is told by digests, in the origins."""
    old, new = flatten(before), flatten(now)

    def differs(key: str) -> bool:
        one, other = old.get(key), new.get(key)
        if key in PLACES:
            return (one is None) != (other is None)
        return one != other and not key.startswith(FREE_ON_RESUME)

    return [
        f"{key} was {old.get(key)!r}, now {new.get(key)!r}" for key in sorted(old.keys() | new.keys()) if differs(key)
    ]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
