"""Checkpoints of a run: written under a temporary name and renamed, so that what has the final name is complete.

OUTPUT/checkpoints/step-00001000/
    pipeline/          the averaged weights as a TransDiffPipeline, ready for from_pretrained
    state/             model.safetensors, ema.safetensors (raw and averaged weights), optimizer.bin, and of each
                       process random_states_RANK.pkl
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
from accelerate.checkpointing import load_accelerator_state, save_accelerator_state
from safetensors import SafetensorError

from training.data.latent_cache import write_json
from training.settings.config import ConfigError, TrainConfig, build
from training.settings.schema import settings_that_differ
from transdiff_pipelines.files import give_usual_mode


class CheckpointError(ValueError):
    """A checkpoint that is missing, cannot continue this run, or cannot be written."""


class BrokenCheckpointError(CheckpointError):
    """A checkpoint that cannot be read. An older one may still be good."""


# Errors that writers raise when the disk is full, and readers when a file is truncated or of another kind.
WRITE_ERRORS = (OSError, RuntimeError, SafetensorError)
READ_ERRORS = (*WRITE_ERRORS, ValueError, KeyError, EOFError, pickle.UnpicklingError)


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def checkpoint_path(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies, or would lie."""
    return output / "checkpoints" / f"step-{step:08d}"


def find_checkpoints(output: Path, resume: str) -> list[Path]:
    """The checkpoints that `resume` (auto, latest, never or a path) means for the run in `output`, best first.

    The second and later ones are used if the first cannot be read. An empty list means to start from the beginning.

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
    """Whether `fine` is true on every process; all processes call this together."""
    return bool(accelerator.gather(torch.tensor([fine], device=accelerator.device)).all())


def resume_from(accelerator: Accelerator, candidates: list[Path], load: Callable[[Path], None]) -> dict[Path, str]:
    """Load the first of the candidates that every process can read; returns why those before it cannot be read.

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
    """Rename the checkpoints after `step`, from which the run continues, to broken-step-... or abandoned-step-...

    Otherwise a later start would take them for checkpoints of this run. Returns a line about each.
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
    """Delete the unfinished checkpoints of runs that were killed while they wrote."""
    for path in (output / "checkpoints").glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def save_process_state(accelerator: Accelerator, folder: Path) -> None:
    """Write the random states of this process and, in a run with fp16, the state of the scaler."""
    folder.mkdir(parents=True, exist_ok=True)
    save_accelerator_state(
        str(folder), [], [], [], [], accelerator.process_index, accelerator.step, accelerator.scaler
    )


def load_process_state(accelerator: Accelerator, folder: Path) -> None:
    """Read what `save_process_state` wrote; a process for which there is no file keeps its random states."""
    load_accelerator_state(str(folder), [], [], [], [], accelerator.process_index, accelerator.scaler)


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
            give_usual_mode((partial / "state").iterdir())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)

    # After each part all processes agree whether to continue. If one of them failed and the others went on, they would
    # wait for it forever in the next gather.
    parts = [make_folder, lambda: save_process_state(accelerator, partial / "state"), lambda: save_weights(partial)]
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
        before = build(TrainConfig, progress["config"])  # a key that did not exist yet gets its default
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint} was written by another version: {error}") from None
    except READ_ERRORS as error:
        raise BrokenCheckpointError(f"{checkpoint / 'progress.json'} cannot be read ({error!r})") from error
    # The global batch may be divided otherwise over batches and processes, so its size is compared and not theirs.
    differing = sorted(settings_that_differ(before, config))
    if progress.get("groups_per_step", groups_per_step) != groups_per_step:
        differing.append(
            f"the global batch (data.batch_size x processes x accumulation) was {progress['groups_per_step']}, "
            f"now {groups_per_step}"
        )
    old = progress.get("origins", {})
    differing += [f"the {name} were others" for name in origins if old.get(name, origins[name]) != origins[name]]
    if differing:
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(differing)}. Set them back, or choose "
            "another output folder (to start from its weights: --model.start_from=.../pipeline)"
        )
    return progress
