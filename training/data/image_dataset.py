"""Training straight from images: read, cropped and mirrored at random each time, encoded by the VAE as training goes.

This is the paper's augmentation, where a latent cache holds one crop of an image and its mirror. It costs a pass of
the VAE for every image, and processes that decode files (`data.workers`).
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from training.settings.config import ConfigError, DataConfig

from .batches import TrainingData
from .decoding import BadImage, random_crop, read_image
from .errors import DataError
from .examples import Example, IndexedSource
from .folders import FolderSource
from .latent_cache import LatentCache, digest_of, read_stamp
from .sources import open_source
from .vae import check_vae, latent_shape, module_fingerprint


COMPARED_IMAGES = 500  # whose contents tell the images of a run from others when it is resumed


class ImageData:
    """The images of a source as `batches.TrainingData`.

    An image that turns out to be unreadable is replaced, always by the same one: the next of its class that can be
    read, or, if the whole class is unreadable, of all.

    Args:
        source: where the images are.
        vae: what will encode them.
        data: their size, whether to mirror them, and how small they may be.

    Attributes:
        labels: `(images,)` int64 class index of each image that has a valid label.
        classes, latent_shape, vae_fingerprint: as in `LatentCache`.
        digest: of names, sizes, labels and classes, and of the contents of up to `COMPARED_IMAGES` images.

    Raises:
        DataError: if no label is valid.
        ConfigError: if the VAE cannot encode such images.
    """

    draws_per_image = 2  # crop, mirror

    def __init__(self, source: IndexedSource, vae: AutoencoderKL, data: DataConfig) -> None:
        check_vae(vae, data.image_size)
        self.source, self.mirror = source, data.mirror
        self.channels, self.size, self.min_side = vae.config.in_channels, data.image_size, data.min_side
        self.classes = source.classes
        self.latent_shape = latent_shape(vae, data.image_size)
        self.vae_fingerprint = module_fingerprint(vae, dict(vae.config))
        self.digest = digest_of(source.digest, source.classes, data.min_side, sample_contents(source))
        labels = np.array([source.example(index).label for index in range(source.length)], dtype=np.int64)
        self.rows = np.flatnonzero(labels >= 0)
        self.labels = labels[self.rows]
        if not len(self.rows):
            raise DataError(f"none of the {source.length} images has a label that names a class")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def select(self, rows: np.ndarray) -> ImageData:
        """Only these of the images, in this order, and all classes."""
        selected = copy.copy(self)
        selected.rows, selected.labels = self.rows[rows], self.labels[rows]
        return selected

    def example(self, image: int) -> Example:
        return self.source.example(int(self.rows[image]))

    def pixels(self, image: int, position: float) -> Tensor:
        """An image, `(c, H, H)` in [-1, 1], cut out at a position in [0, 1).

        Raises:
            BadImage: if it cannot be read.
        """
        crop = partial(random_crop, position=position)
        return read_image(self.example(image).load(), self.size, self.channels, self.min_side, crop)

    def draw(self, image: int, uniform: Sequence[float]) -> dict[str, Tensor]:
        """The `pixels` of an image, cropped and mirrored as two numbers in [0, 1) want it, and which image was
        `wanted` and which is `used`.

        Raises:
            DataError: if no image at all can be read.
        """
        position, flip = uniform
        used, pixels = self._readable(image, position)
        pixels = pixels.flip(-1) if self.mirror and flip < 0.5 else pixels
        return {"pixels": pixels, "wanted": torch.tensor(image), "used": torch.tensor(used)}

    def _readable(self, image: int, position: float) -> tuple[int, Tensor]:
        problem = ""
        for candidate in self._in_turn(image):
            try:
                return candidate, self.pixels(candidate, position)
            except BadImage as error:
                problem = problem or f"{self.example(image).name}: {error}"
        raise DataError(f"none of the {len(self)} images can be read, such as {problem}")

    def _in_turn(self, image: int) -> Iterator[int]:
        """The image, then those after it, of its class and then of the others."""
        yield image
        after = np.roll(np.arange(len(self)), -image)[1:]
        same = self.labels[after] == self.labels[image]
        yield from (*after[same].tolist(), *after[~same].tolist())

    def readable(self) -> ImageData:
        """Only the images that can be read: all are tried."""

        def can_be_read(image: int) -> bool:
            try:
                self.pixels(image, 0.0)
            except BadImage:
                return False
            return True

        return self.select(np.array([image for image in range(len(self)) if can_be_read(image)], dtype=np.int64))

    def collect(self, drawn: dict[str, Tensor], normal: Tensor) -> dict[str, Tensor]:
        """What `vae.PixelEncoder` makes latents of, and the numbers of the images wanted and used."""
        return {name: drawn[name] for name in ("pixels", "wanted", "used")} | {"posterior": normal}


def sample_contents(source: IndexedSource) -> list[int]:
    """The digests of evenly spaced images, of all in a small data set: reading a large one would take too long."""
    return [source.example(i).digest() for i in range(0, source.length, -(-source.length // COMPARED_IMAGES))]


def open_data(data: DataConfig, vae: AutoencoderKL) -> TrainingData:
    """The latent cache, or without one the images themselves.

    Raises:
        DataError, ConfigError: if it is not there, or does not fit the VAE or the configuration.
    """
    if data.cache is not None:
        cache = LatentCache(data.cache)
        fingerprint = module_fingerprint(vae, dict(vae.config))
        cache.check(vae_fingerprint=fingerprint, image_size=data.image_size, mirror=data.mirror)
        return cache
    source = None if data.streaming else open_source(data)
    if not isinstance(source, IndexedSource):
        raise ConfigError(
            "a stream gives no image twice and none by number, so it cannot be trained on directly: set data.cache, "
            "and run training.cache_latents, which reads it without a download"
        )
    return ImageData(source, vae, data)


def changed_files(data: DataConfig) -> list[str]:
    """A warning, if the files of `data.images` differ in names, sizes or times from those that `data.cache` was made
    of or last compared with. Their contents are compared by training.cache_latents alone, which takes longer.
    """
    if data.images is None or not Path(data.images).is_dir():  # training needs no images, and may go on without
        return []
    try:
        found = FolderSource(Path(data.images), data.classes).stamp()
    except (DataError, ConfigError) as error:
        found = str(error)
    if found == read_stamp(Path(str(data.cache))):
        return []
    return [
        f"warning: the files of {data.images} are not as they were when {data.cache} was made: if images have changed,"
        " the cache holds the old ones. training.cache_latents, run again, compares their contents"
    ]


class Unreadable:
    """Names the images of a run that could not be read, each once, in OUTPUT/unreadable.txt and on the terminal.

    Every process tells of its own batches.

    Args:
        data: the images.
        output: folder of the run.
    """

    def __init__(self, data: ImageData, output: Path) -> None:
        self.data, self.file = data, output / "unreadable.txt"
        self.names = {line.partition(": ")[0] for line in self.lines()}

    def lines(self) -> list[str]:
        return self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else []

    def note(self, batch: dict[str, Tensor]) -> None:
        """Tell of the images of a batch that others took the place of."""
        wanted, used = batch["wanted"], batch["used"]
        for image in wanted[wanted != used].tolist():
            name = self.data.example(image).name
            if name in self.names:
                continue
            self.names.add(name)
            line = f"{name}: {self._reason(image)}"
            tqdm.write(f"{line}; another image takes its place whenever it is drawn", file=sys.stdout)
            if self.file.parent.is_dir():  # a dry run has no folder
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(f"{line}\n")

    def _reason(self, image: int) -> str:
        try:
            self.data.pixels(image, 0.0)
        except BadImage as error:
            return str(error)
        return "could not be read for a while"

    def summary(self) -> list[str]:
        """A line with their number, of all processes and of the run so far; none if there are none."""
        count = len({line.partition(": ")[0] for line in self.lines()})
        return [f"{count} image(s) could not be read and were replaced: {self.file}"] if count else []
