"""Outpainting is inpainting on a padded canvas; this is the padding."""

import numpy as np
from PIL import Image


def pad_for_outpainting(
    image: Image.Image, padding: int | tuple[int, int, int, int]
) -> tuple[Image.Image, Image.Image]:
    """Put an image on a larger canvas and mask what is new.

    The border repeats the image's edge: nothing of it stays, but the VAE sees it beside the known pixels, and a
    sharp frame would colour their latents. An inpainting pipeline takes one canvas size only, so make the image
    smaller first: `pad_for_outpainting(image.resize((192, 192)), 32)` fits a model of 256 pixels. Padding in
    multiples of `pipe.vae_scale_factor` keeps the seam on the latent grid.

    Args:
        image: what stays.
        padding: pixels to add on all sides, or `(left, top, right, bottom)`, as in `PIL.ImageOps.expand`.

    Returns:
        The canvas, of the image's mode, and its mask of mode "L": white where padded.

    Raises:
        TypeError: not a PIL image, or not one or four ints.
        ValueError: negative padding, or none at all.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(f"image is a {type(image).__name__}; expected a PIL image")
    sides = padding if isinstance(padding, tuple) else (padding,) * 4
    if len(sides) != 4 or not all(isinstance(side, int) for side in sides):
        raise TypeError(f"padding is {padding!r}; expected an int or (left, top, right, bottom)")
    if min(sides) < 0 or max(sides) == 0:
        raise ValueError(f"padding is {padding}; expected at least 0 on every side, and more on one")
    left, top, right, bottom = sides
    pixels = np.asarray(image)
    margins = ((top, bottom), (left, right))
    canvas = np.pad(pixels, (*margins, *[(0, 0)] * (pixels.ndim - 2)), mode="edge")
    mask = np.pad(np.zeros(pixels.shape[:2], np.uint8), margins, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)
