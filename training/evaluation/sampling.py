"""Sampling many images: every image's randomness comes from its global index, and finished batches stay finished.

Which images share a batch depends on the batch size alone, so that any number of processes writes identical files,
and a run that goes on after an interruption writes those that an uninterrupted one would have written.
"""

import inspect
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.data.batches import keyed_generator
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import new_file


LABEL_MODES = ("balanced", "random")
SETTINGS_FILE = "sampling.json"


class SamplingError(ValueError):
    """A request that cannot be met as it stands; the message says why."""


def make_labels(count: int, num_classes: int, mode: str, seed: int) -> np.ndarray:
    """The label of every image, `(count,)`: 0, 1, ... in turn ("balanced"), or drawn for each ("random").

    Raises:
        SamplingError: balanced labels that would not be as many of each class.
    """
    if mode not in LABEL_MODES:
        raise SamplingError(f"labels {mode!r} are unknown; choose one of {LABEL_MODES}")
    if count < 2:
        raise SamplingError(f"the number of images is {count}; statistics need at least 2")
    if mode == "random":
        return torch.randint(num_classes, (count,), generator=keyed_generator(seed, -1)).numpy()
    if count % num_classes:
        raise SamplingError(
            f"{count} images cannot be as many of each of the {num_classes} classes; choose a multiple of "
            f"{num_classes}, or random labels"
        )
    return np.arange(count) % num_classes


def check_call(pipe: TransDiffPipeline, call: dict[str, Any]) -> None:
    """Have the pipeline look at the arguments of a call, without a call.

    Raises:
        SamplingError: it refuses one.
    """
    signature = inspect.signature(pipe.check_inputs)
    call_signature = inspect.signature(pipe.__call__)
    defaults = {name: call_signature.parameters[name].default for name in signature.parameters}
    try:
        pipe.check_inputs(**{**defaults, "class_labels": 0, **call})
    except (TypeError, ValueError) as error:
        raise SamplingError(str(error)) from error


def image_path(folder: Path, index: int) -> Path:
    """Where image `index` is written."""
    return folder / "images" / f"{index:06d}.png"


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Note the settings in a new folder; in one with images, they must be those that the images were made with.

    Raises:
        SamplingError: naming what differs.
    """
    path = folder / SETTINGS_FILE
    if not path.exists():
        with new_file(path) as temporary:
            temporary.write_text(json.dumps(settings, indent=2) + "\n")
        return
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(settings))
    differing = [
        f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    if differing:
        raise SamplingError(
            f"{folder} holds images made with other settings: {'; '.join(differing)}. Choose another output folder"
        )


def sample(
    pipe: TransDiffPipeline,
    labels: np.ndarray,
    folder: Path,
    seed: int,
    batch_size: int,
    call: dict[str, Any],
    rank: int = 0,
    world_size: int = 1,
) -> int:
    """Write this process's share of the images that are missing; returns how many were made.

    Args:
        labels: of all images, `(N,)`.
        call: arguments of the pipeline's call.
    """
    starts = range(0, len(labels), batch_size)
    batches = [range(start, min(start + batch_size, len(labels))) for start in starts][rank::world_size]
    missing = [batch for batch in batches if not all(image_path(folder, index).exists() for index in batch)]
    made = 0
    with tqdm(total=sum(map(len, missing)), desc="sampling", unit="image", disable=rank != 0) as progress:
        for batch in missing:
            generators = [keyed_generator(seed, index) for index in batch]
            try:
                images = pipe(labels[batch].tolist(), generator=generators, output_type="pil", **call).images
            except (TypeError, ValueError) as error:  # of the settings, which the pipeline looks at first
                raise SamplingError(str(error)) from error
            for index, image in zip(batch, images, strict=True):
                with new_file(image_path(folder, index)) as temporary:
                    image.save(temporary, format="png")
            made += len(batch)
            progress.update(len(batch))
    return made


def read_images(paths: Sequence[Path], batch_size: int = 100) -> Iterator[torch.Tensor]:
    """Pictures of one size, in batches `(B, 3, H, W)` uint8."""
    for start in range(0, len(paths), batch_size):
        pixels = [np.asarray(Image.open(path).convert("RGB")) for path in paths[start : start + batch_size]]
        yield torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def write_npz(paths: Sequence[Path], output: Path) -> None:
    """All pictures as `arr_0` `(N, H, W, 3)` uint8, the form of ADM's evaluator, a batch in memory at a time."""
    height, width = np.asarray(Image.open(paths[0])).shape[:2]
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(paths), height, width, 3)}
    with (
        new_file(output) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for images in read_images(paths):
            member.write(images.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
