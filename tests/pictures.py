"""Looking at image files, which are closed again."""

import os

from PIL import Image


def size_of(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height in pixels."""
    with Image.open(path) as image:
        return image.size
