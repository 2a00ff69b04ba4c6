"""Reading a released `.pth` file without running anything that is in it."""

import argparse
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def read_original_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The weights in a released checkpoint, by their released names.

    The exponential moving average (`model_ema`) holds the published weights; `model` is read where it is missing.
    Tensors are mapped from the file, so the optimizer's share of a training checkpoint is never read.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read as tensors, plain containers and an `argparse.Namespace` (the record of
            the training command line), or holds no weights.
    """
    content = _load(Path(path))
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}; expected a dict with 'model_ema' or 'model'")
    weights = content.get("model_ema") or content.get("model")
    if not weights:
        found = ", ".join(map(str, list(content)[:8])) or "nothing"
        raise ValueError(f"{path} is no released checkpoint: expected 'model_ema' or 'model', found {found}")
    if not isinstance(weights, Mapping) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no released checkpoint: its weights are not a dict of tensors")
    return dict(weights)


def _load(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint file {path}")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # arbitrary bytes can make an unpickler raise anything
        reason = str(error).strip().splitlines()
        raise ValueError(
            f"{path} cannot be read as a released checkpoint. Either it is not one, or its download was cut short, or "
            "it holds objects other than tensors, plain containers and argparse.Namespace, which are refused because "
            f"unpickling them can run code. torch says: {reason[0] if reason else type(error).__name__}"
        ) from error
