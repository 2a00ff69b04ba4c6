"""Images that a user gives to start AR sequences with: paths, pictures, arrays to pixels of the model's size.

Shapes: B sequences, n reference images each, C latent channels, s latent side, H = W pixels.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image, ImageOps

from .checks import missing
from .image_inputs import check_images, is_latents


# One of these for each image: a PIL image, an array or a tensor in [0, 1], a path, or scaled latents (C, s, s).
ReferenceImages = Sequence[Any] | torch.Tensor

_PROCESSOR = VaeImageProcessor(do_resize=False, do_normalize=False)


def load_references(
    reference_images: ReferenceImages,
    num_labels: int,
    num_ar_steps: int,
    latents_shape: tuple[int, ...],
    side: int | None,
) -> list[torch.Tensor]:
    """The B n images that start the AR sequences of B labels, sequence by sequence: pixels or latents, as given.

    Args:
        reference_images: for each label a list of n images of its class; for a single label the list alone will do;
            or scaled latents `(B, n, C, s, s)`. PIL images and paths are cropped to the centre square and resized;
            arrays `(H, W, 3)` and tensors `(3, H, W)` in [0, 1] must have the model's size; a tensor `(C, s, s)`
            holds scaled latents.
        num_labels: B.
        num_ar_steps: images of the sequence, the references counted.
        latents_shape: `(C, s, s)`.
        side: H; None without a VAE, which could not encode them.

    Returns:
        For each image a tensor of pixels `(3, H, W)` in [0, 1], or of scaled latents `(C, s, s)`.

    Raises:
        ValueError, TypeError: too many images for the sequence, lists that do not fit the labels, or an image that
            cannot be used.
    """
    if isinstance(reference_images, torch.Tensor):
        if reference_images.ndim != 5 or tuple(reference_images.shape[2:]) != latents_shape:
            raise ValueError(
                f"reference_images is a tensor of shape {tuple(reference_images.shape)}; expected scaled latents "
                f"({num_labels}, n, {', '.join(map(str, latents_shape))}); pass images as a list"
            )
        _check_counts([reference_images.shape[1]] * len(reference_images), num_labels, num_ar_steps)
        return list(reference_images.flatten(0, 1))
    groups = _as_groups(reference_images, num_labels)
    _check_counts([len(group) for group in groups], num_labels, num_ar_steps)
    return [_load(image, latents_shape, side) for group in groups for image in group]


def _as_groups(images: Any, num_labels: int) -> list[list[Any]]:
    """A list of images for each label; a flat list belongs to a single label."""
    if not isinstance(images, (list, tuple)):
        images = [images]
    nested = [isinstance(image, (list, tuple)) for image in images]
    if not any(nested) and num_labels == 1:
        return [list(images)]
    if not all(nested) or len(images) != num_labels:
        raise ValueError(
            f"reference_images has {len(images)} entries for {num_labels} label(s); expected a list of images for "
            "each label: [[image, ...], ...]"
        )
    return [list(group) for group in images]


def _check_counts(counts: list[int], num_labels: int, num_ar_steps: int) -> None:
    if num_ar_steps == 1:
        raise ValueError("reference_images were given, but there is one image to a sequence here, which reads none")
    if len(counts) != num_labels:
        raise ValueError(f"reference_images are given for {len(counts)} label(s), but there are {num_labels}")
    if len(set(counts)) > 1 or not 1 <= counts[0] < num_ar_steps:
        raise ValueError(
            f"reference_images has {counts} images per label; expected the same number for all, from 1 to "
            f"{num_ar_steps - 1}: the sequence has {num_ar_steps} images and the last is generated"
        )


def _is_latents(image: Any, latents_shape: tuple[int, ...]) -> bool:
    return isinstance(image, torch.Tensor) and image.ndim == 3 and is_latents(image, latents_shape)


def _load(image: Any, latents_shape: tuple[int, ...], side: int | None) -> torch.Tensor:
    """Pixels `(3, H, W)` in [0, 1], or scaled latents `(C, s, s)` as they are."""
    if _is_latents(image, latents_shape):
        return image
    if side is None:
        raise missing("vae")
    if isinstance(image, (str, os.PathLike)):
        if not Path(image).is_file():
            raise ValueError(f"reference image {str(image)!r} is not a file; pass the path of a picture")
        with Image.open(image) as picture:
            image = ImageOps.exif_transpose(picture)
    if isinstance(image, Image.Image):
        image = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    check_images(image, side)
    return _PROCESSOR.preprocess(image)[0].float()
