"""Checkpoints of a run: written under a temporary name and renamed, so that what has the final name is complete.

OUTPUT/checkpoints/step-00001000/
    pipeline/          the averaged weights as a TransDiffPipeline, ready for from_pretrained
    state/             raw weights and optimiser (accelerate's format), ema.safetensors
    progress.json      step, skipped steps, the resolved configuration
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from .latent_cache import write_json


class CheckpointError(ValueError):
    """A checkpoint that is missing, or that cannot continue this run."""


# Settings that may change when a run goes on; any other difference would make it a different run.
FREE_ON_RESUME = (
    "output",
    "resume",
    "log_every",
    "checkpoints.",
    "preview.",
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
    "optimizer.max_bad_steps",
)


def checkpoint_folders(output: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    folders = (output / "checkpoints").glob("step-*")
    return sorted(path for path in folders if re.fullmatch(r"step-\d+", path.name) and path.is_dir())


def find_checkpoint(output: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` (auto, latest, never or a path) means for the run in `output`.

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
        return None
    if resume in ("auto", "latest"):
        if not existing and resume == "latest":
            raise CheckpointError(f"--resume=latest, but {output / 'checkpoints'} has no complete checkpoint")
        return existing[-1] if existing else None
    path = Path(resume)
    if not (path / "progress.json").is_file():
        raise CheckpointError(f"--resume={resume}: no such checkpoint; give auto, latest, never or a step-... folder")
    return path


def save_checkpoint(
    accelerator: Accelerator, output: Path, progress: dict[str, Any], save_main: Callable[[Path], None], keep: int
) -> Path:
    """Write the checkpoint of `progress["step"]`, then delete all but the latest `keep`.

    Args:
        accelerator: holds the prepared model and optimiser; all processes call this together.
        progress: what progress.json will hold.
        save_main: writes what the main process alone writes (pipeline, EMA) into a folder.
        keep: how many checkpoints stay.
    """
    final = output / "checkpoints" / f"step-{progress['step']:08d}"
    partial = final.with_name(f".{final.name}.partial")
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial / "state"))
    if accelerator.is_main_process:
        save_main(partial)
        write_json(partial / "progress.json", progress)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in checkpoint_folders(output)[:-keep]:
            shutil.rmtree(old)
    return final


def read_progress(checkpoint: Path, config: dict[str, Any]) -> dict[str, Any]:
    """progress.json of a checkpoint, checked against the configuration of the run that wants to continue it.

    Raises:
        CheckpointError: naming every setting that differs and may not.
    """
    progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
    before, now = flatten(progress["config"]), flatten(config)
    differing = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(FREE_ON_RESUME)
    ]
    if differing:
        raise CheckpointError(
            f"{checkpoint} belongs to a run with other settings: {'; '.join(differing)}. Set them back, or choose "
            "another output folder (to start from its weights: --model.start_from=.../pipeline)"
        )
    return progress


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat
