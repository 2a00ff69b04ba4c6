"""What a data set is to this package: images with labels, in streams that are always read in the same order.

An image is described by an `Example`, which costs nothing until it is loaded, so that images already cached are passed
over quickly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image

from .decoding import BadImage, in_memory


@dataclass(frozen=True)
class Example:
    """An image not loaded yet.

    Attributes:
        name: file name or row, for messages.
        label: class index.
        load: returns the image in a form that `decoding.read_image` takes.
        problem: why the image cannot be used, if its label is wrong; `label` is -1 then.
    """

    name: str
    label: int
    load: Callable[[], Any]
    problem: str = ""

    def digest(self) -> int:
        """`content_digest` of the image and its label; of an image that cannot be read or used, of its label alone."""
        try:
            return content_digest(self.label, None if self.problem else in_memory(self.load()))
        except BadImage:
            return content_digest(self.label, None)


def content_digest(label: int, image: Any) -> int:
    """64 bits, as an int64, that tell a label and an image from others: by its encoded bytes, or else its pixels.

    Args:
        label: class index.
        image: as `decoding.in_memory` gives it; None if there is none.
    """
    parts: list[Any] = [label]
    if isinstance(image, Image.Image):
        parts += [image.mode, image.size, image.info.get("exif"), image.tobytes()]
    elif isinstance(image, np.ndarray):
        parts += [image.dtype, image.shape, image.tobytes()]
    else:
        parts.append(image)
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(part if isinstance(part, bytes) else repr(part).encode())
    return int.from_bytes(digest.digest(), "little", signed=True)


class Source(Protocol):
    """What `cache_latents` needs to know of a data set.

    Attributes:
        classes: class names in index order.
        num_streams: how many streams there are.
        length: images in all, if that is known without reading them.
        digest: changes when images come, go, or have other names, labels or sizes, as far as can be told without
            reading them; the same wherever the data set lies.
        compared: how many images of each stream are compared with a cache if `stamp` does not vouch for them; None:
            all.
        notes: sentences on what was left out.
    """

    classes: list[str]
    num_streams: int
    digest: str
    compared: int | None

    @property
    def notes(self) -> list[str]: ...

    @property
    def length(self) -> int | None: ...

    def stamp(self) -> str | None:
        """Changes when a file of the data set is written, replaced or moved to another machine, whether its content
        changes or not; None if there are no files to tell by.
        """
        ...

    def examples(self, stream: int) -> Iterator[Example]:
        """The images of one stream, always in the same order."""
        ...


class IndexedSource:
    """A source of known length, whose images can be had in any order: one stream.

    Attributes:
        classes, length, digest, notes: as in `Source`.
    """

    num_streams = 1
    compared: int | None = None
    classes: list[str]
    length: int
    digest: str
    notes: list[str]

    def stamp(self) -> str | None:
        raise NotImplementedError

    def example(self, index: int) -> Example:
        """The image with this number in 0 .. length - 1."""
        raise NotImplementedError

    def examples(self, stream: int) -> Iterator[Example]:
        return map(self.example, range(self.length))
