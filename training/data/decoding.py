"""Image files of every kind to the pixels that a VAE encodes; what cannot be used is a `BadImage` with the reason.

| image | what becomes of it |
|---|---|
| rotated or mirrored by its EXIF orientation | turned upright first |
| grey, palette, CMYK, YCbCr, 1 bit | to RGB (to grey for a VAE with one channel), without colour management |
| with transparency (RGBA, LA, palette or RGB with a transparent colour) | laid over white |
| 16-bit grey (also where Pillow reads it as 32-bit integers) | scaled from 0..65535 to 0..255; outside that: bad |
| floating point | bad: its range is unknown |
| animated | the first frame |
| small | enlarged; bad if its shorter side has fewer than `min_side` pixels |
| truncated, corrupt, larger than Pillow's limit against decompression bombs | bad |
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.ImageFile import StubImageFile
from torch import Tensor


# Formats that Pillow names but does not decode by itself: MPEG not at all, EPS by running another program.
NOT_DECODED = {"EPS", "MPEG"}


def openable_suffixes() -> set[str]:
    """The suffixes, in lower case and with their dots, of the image files that this Pillow can decode."""
    formats = Image.registered_extensions()  # loads the plugins
    stubs = {name for name, (made_by, _) in Image.OPEN.items() if is_stub(made_by)}
    decoded = Image.OPEN.keys() - stubs - NOT_DECODED
    return {suffix for suffix, name in formats.items() if name in decoded}


def is_stub(made_by: Any) -> bool:
    """Whether the reader of a format leaves decoding to a plugin that is not there."""
    return isinstance(made_by, type) and issubclass(made_by, StubImageFile)


IMAGE_SUFFIXES = openable_suffixes()


# An image and a size in pixels, to a square of that size.
Crop = Callable[[Image.Image, int], Image.Image]


class BadImage(ValueError):
    """An image that cannot be used; the message says why."""


def read_image(source: Any, size: int, channels: int, min_side: int = 1, crop: Crop | None = None) -> Tensor:
    """One image, upright and cropped to a square, `(channels, size, size)` in [-1, 1].

    Args:
        source: path, encoded bytes, a `{"bytes": ..., "path": ...}` dictionary as in datasets, a PIL image, or an
            array `(height, width)` or `(height, width, channels)` of uint8 or, if grey, uint16.
        size: side in pixels.
        channels: 1 (grey) or 3 (RGB).
        min_side: images with a shorter side of fewer pixels are refused.
        crop: makes the square of `size` pixels; `center_crop` by default.

    Raises:
        BadImage: if the image cannot be used.
    """
    crop = crop or center_crop
    try:
        with open_image(source) as image:
            if min(image.size) < min_side:
                raise BadImage(f"{image.width}x{image.height} pixels; the shorter side must have {min_side}")
            upright = ImageOps.exif_transpose(image)
            return image_to_tensor(crop(eight_bit(upright).convert("L" if channels == 1 else "RGB"), size))
    except BadImage:
        raise
    except Exception as error:  # decoders raise whatever the damage makes them stumble on
        where = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")
        raise BadImage(f"{type(error).__name__}: {where.sub('', str(error))}") from error


def in_memory(source: Any) -> Any:
    """What `read_image` takes, with the bytes of a file in place of its path.

    Raises:
        BadImage: if the file cannot be read.
    """
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if not isinstance(source, str | Path):
        return source
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise BadImage(f"{type(error).__name__}: {error.strerror}") from error


def open_image(source: Any) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.copy()
    if isinstance(source, dict):
        source = source.get("path") if source.get("bytes") is None else source["bytes"]
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source))
    if isinstance(source, np.ndarray):
        return Image.fromarray(source)
    if isinstance(source, str | Path):
        return Image.open(source)
    raise BadImage(f"{type(source).__name__} is not an image")


def eight_bit(image: Image.Image) -> Image.Image:
    """The image with 8 bits a channel and without transparency, which is laid over white."""
    if image.mode == "F":
        raise BadImage("floating-point pixels, whose range is unknown")
    if image.mode.startswith("I"):  # I;16 and its byte orders; I where Pillow widens 16 bits to 32
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage(f"integer pixels from {values.min()} to {values.max()}; 0 to 65535 is understood")
        return Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve while twice too large, scale the shorter side to `size`, cut out the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, position: float) -> Image.Image:
    """The largest square, at a position in [0, 1) along the longer side, scaled to `size` bicubically."""
    side = min(image.size)
    left, top = (int(position * (length - side + 1)) for length in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box)


def image_to_tensor(image: Image.Image) -> Tensor:
    """A grey or RGB image to `(channels, height, width)` in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())
