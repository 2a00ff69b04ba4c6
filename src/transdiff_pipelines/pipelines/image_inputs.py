"""Images and masks as people pass them, checked before any work; the conversion is left to `VaeImageProcessor`.

Shapes: H, W pixels; C latent channels, s latent side. Arrays are channels last, tensors channels first.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import PipelineImageInput
from PIL import Image


MASK_MODES = ("1", "L", "RGB")  # an alpha channel would be dropped in silence, a palette's indices mean nothing


def is_latents(image: PipelineImageInput | None, latents_shape: Sequence[int]) -> bool:
    """Whether `image` is a tensor of latents, `(C, s, s)` or a batch of these, and needs no encoding."""
    return isinstance(image, torch.Tensor) and image.ndim in (3, 4) and image.shape[-3:] == tuple(latents_shape[-3:])


def check_images(image: PipelineImageInput | None, side: int) -> None:
    """Raise unless `image` is one or several RGB images of `side` times `side` pixels.

    Accepted are PIL images of mode "RGB", arrays `(H, W, 3)` or `(B, H, W, 3)` and tensors `(3, H, W)` or
    `(B, 3, H, W)` of floats in [0, 1], and lists of images of one of these kinds.

    Raises:
        TypeError: another type, or an array of another dtype.
        ValueError: another mode, shape, size or range.
    """
    for item in _as_list("image", image):
        if isinstance(item, Image.Image):
            if item.mode != "RGB":
                raise ValueError(f"image has mode {item.mode!r}; convert it: image.convert('RGB')")
            width, height = item.size
        else:
            check_values("image", item)
            shape = tuple(item.shape)
            if isinstance(item, np.ndarray):  # channels last to channels first
                shape = (*shape[:-3], *shape[-1:], *shape[-3:-1])
            if len(shape) not in (3, 4) or shape[-3] != 3:
                raise ValueError(
                    f"image has shape {tuple(item.shape)}; expected a tensor (B, 3, H, W), an array (B, H, W, 3), or "
                    "either without the B"
                )
            height, width = shape[-2:]
        _check_size("image", item, (width, height), side)


def check_masks(mask: PipelineImageInput | None, side: int) -> None:
    """Raise unless `mask` is one or several masks of `side` times `side` pixels, white where to repaint.

    Accepted are PIL images of mode "1", "L" or "RGB", arrays and tensors `(H, W)` or `(B, H, W)`, with or without a
    channel, of bools or of floats in [0, 1], and lists of masks of one of these kinds.

    Raises:
        TypeError: another type, or an array of another dtype.
        ValueError: another mode, shape, size or range.
    """
    for item in _as_list("mask_image", mask):
        if isinstance(item, Image.Image):
            if item.mode not in MASK_MODES:
                raise ValueError(f"mask_image has mode {item.mode!r}; convert it: mask_image.convert('L')")
            width, height = item.size
        else:
            check_values("mask_image", item)
            shape = tuple(item.shape)
            channels_last = isinstance(item, np.ndarray) and len(shape) > 2 and shape[-1] == 1
            shape = shape[:-1] if channels_last else shape
            channels_first = isinstance(item, torch.Tensor) and len(shape) == 4 and shape[1] == 1
            if len(shape) not in (2, 3) and not channels_first:
                raise ValueError(
                    f"mask_image has shape {tuple(item.shape)}; expected (H, W) or (B, H, W), with at most one channel"
                )
            height, width = shape[-2:]
        _check_size("mask_image", item, (width, height), side)


def _check_size(name: str, item: Any, size: tuple[int, int], side: int) -> None:
    if size != (side, side):
        # An array has a `resize`, too, which repeats or drops values.
        how = f": {name}.resize(({side}, {side}))" if isinstance(item, Image.Image) else ""
        raise ValueError(
            f"{name} has {size[0]}x{size[1]} pixels, but this model's latent grid makes {side}x{side}; resize it{how}"
        )


def check_values(name: str, array: np.ndarray | torch.Tensor) -> None:
    """Raise unless an array holds floats in [0, 1]; a mask may hold bools."""
    values = array if isinstance(array, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(array))
    if values.dtype == torch.bool and name == "mask_image":
        return
    if not values.is_floating_point():
        raise TypeError(f"{name} is an array of {array.dtype}; expected floats in [0, 1]: divide bytes by 255")
    if values.numel() == 0 or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(f"{name} has values outside [0, 1] (or none); scale it to that range")


def common_batch_size(**counts: int) -> int:
    """The number of edits, when every input has one entry for each of them or one for all.

    Raises:
        ValueError: the inputs' counts do not fit together.
    """
    size = max(counts.values())
    if any(count not in (1, size) for count in counts.values()):
        given = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise ValueError(f"got {given}; pass one of each for every edit, or a single one for all")
    return size


def _as_list(name: str, images: Any) -> list[Any]:
    kinds = (Image.Image, np.ndarray, torch.Tensor)
    items = images if isinstance(images, list) else [images]
    if not items or not any(all(isinstance(item, kind) for item in items) for kind in kinds):
        found = ", ".join(sorted({type(item).__name__ for item in items})) or "an empty list"
        raise TypeError(f"{name} is {found}; expected a PIL image, an array or a tensor, or a list of one kind")
    if isinstance(images, list) and any(getattr(item, "ndim", 0) == 4 for item in items):
        raise ValueError(f"{name} is a list of batches; pass one batch, or a list of single images")
    return items
