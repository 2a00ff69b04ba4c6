"""What generated images are compared with: statistics, and features for precision and recall.

| reference | FID | sFID | precision, recall |
|---|---|---|---|
| ADM reference batch (`.npz` with mu, sigma, mu_s, sigma_s, arr_0) | yes | yes | yes |
| extracted statistics (`.npz` with mu, sigma) | yes | - | - |
| `.npz` with arr_0, a folder of images, `hf:NAME[:SPLIT]` | yes | yes | yes |

The last kind is computed once and cached; whether there are spatial features depends on the extractor.
"""

import hashlib
import itertools
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from training.data.decoding import IMAGE_SUFFIXES, BadImage, read_image
from training.data.folders import find_images, times
from training.evaluation.features import Extractor, Features
from training.evaluation.metrics import RunningStatistics, Statistics
from transdiff_pipelines.files import check_folder_writable, new_file


MAXIMUM_FEATURES = 10_000
"""Images that precision and recall look at, as many as an ADM reference batch has."""

Batches = Iterator[torch.Tensor]


class ReferenceImagesError(ValueError):
    """A reference that cannot be read; the message says what was expected."""


@dataclass
class Reference:
    """Statistics of the real images and, where there are images, features of up to 10,000 of them.

    Attributes:
        statistics: of the pooled features.
        spatial: of the spatial features, None without.
        features: `(N, D)` for precision and recall, None without images.
    """

    statistics: Statistics
    spatial: Statistics | None = None
    features: torch.Tensor | None = None

    def save(self, path: Path) -> None:
        """Write an `.npz` that `load` reads."""
        arrays = {"mu": self.statistics.mean, "sigma": self.statistics.covariance}
        arrays["count"] = np.array(self.statistics.count)
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features.numpy()
        with new_file(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: Path) -> "Reference":
        """Read what `save` wrote, or an `.npz` with mu and sigma (and mu_s, sigma_s).

        Raises:
            ReferenceImagesError: it cannot be read.
        """
        with _arrays(path) as arrays:
            count = int(arrays["count"]) if "count" in arrays else None
            has_spatial = {"mu_s", "sigma_s"} <= set(arrays)
            spatial = Statistics(arrays["mu_s"], arrays["sigma_s"], count) if has_spatial else None
            features = torch.from_numpy(arrays["features"]) if "features" in arrays else None
            return cls(Statistics(arrays["mu"], arrays["sigma"], count), spatial, features)


@contextmanager
def _arrays(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of an `.npz`; whatever stops reading them is said as an error of this file."""
    try:
        with path.open("rb") as file:  # numpy leaves a file open that is no whole archive
            loaded = np.load(file)
            if isinstance(loaded, np.ndarray):
                raise ReferenceImagesError(
                    f"{path} holds one array without a name; expected an .npz, as np.savez writes"
                )
            with loaded as arrays:
                yield arrays
    except ReferenceImagesError:
        raise
    except Exception as error:  # numpy, zipfile and zlib each have their own
        raise ReferenceImagesError(f"{path} is no whole .npz file: {type(error).__name__}: {error}") from error


def check_fits(reference: Reference, source: str, features: Features, extractor_name: str) -> None:
    """Hold a reference against the features it will be compared with.

    Raises:
        ReferenceImagesError: they have other numbers of features, or the reference has values that are not finite.
    """
    sides = [("pooled", reference.statistics, features.pool)]
    if reference.spatial is not None and features.spatial is not None:
        sides.append(("spatial", reference.spatial, features.spatial))
    for kind, statistics, own in sides:
        mean, covariance = np.shape(statistics.mean), np.shape(statistics.covariance)
        width = own.shape[1]
        if mean != (width,) or covariance != (width, width):
            raise ReferenceImagesError(
                f"{source} has a mean of shape {mean} and a covariance of shape {covariance} of {kind} features, and "
                f"the extractor {extractor_name!r} makes {width}; take the extractor that the statistics were made "
                "with, or images as the reference"
            )
        if not (np.isfinite(statistics.mean).all() and np.isfinite(statistics.covariance).all()):
            raise ReferenceImagesError(f"{source} has statistics that are not finite; make them anew")


def measure_images(batches: Batches, extractor: Extractor, total: int | None = None) -> Reference:
    """Extract features batch by batch."""
    pool, spatial, kept = RunningStatistics(), RunningStatistics(), []
    with tqdm(total=total, desc="reference features", unit="image") as progress:
        for images in batches:
            features = extractor(images)
            if pool.count < MAXIMUM_FEATURES:
                kept.append(features.pool[: MAXIMUM_FEATURES - pool.count].float().cpu())
            pool.add(features.pool)
            if features.spatial is not None:
                spatial.add(features.spatial)
            progress.update(len(images))
    if pool.count < 2:
        raise ReferenceImagesError(f"the reference has {pool.count} image(s); statistics need at least 2")
    return Reference(pool.result(), spatial.result() if spatial.count else None, torch.cat(kept))


def load_reference(source: str, extractor: Extractor, extractor_name: str, side: int, cache: Path) -> Reference:
    """The reference that `source` names (see the table above).

    Args:
        extractor_name: part of the cache's key.
        side: pixels; images of other sizes are centre-cropped and resized.
        cache: folder for what was computed.

    Raises:
        ReferenceImagesError: it does not exist, or holds nothing usable.
    """
    path = Path(source)
    if path.suffix == ".npz" and path.is_file():
        with _arrays(path) as arrays:
            names = set(arrays)
        if {"mu", "sigma"} <= names:
            reference = Reference.load(path)
            if "arr_0" in names and reference.features is None:
                reference.features = _cached(source, extractor, extractor_name, side, cache).features
            return reference
        if "arr_0" not in names:
            raise ReferenceImagesError(f"{path} holds {sorted(names)}; expected mu and sigma, or images as arr_0")
    return _cached(source, extractor, extractor_name, side, cache)


def _cached(source: str, extractor: Extractor, extractor_name: str, side: int, cache: Path) -> Reference:
    key, batches, total = _open(source, side)
    digest = hashlib.sha256(f"{key} {extractor_name} {side}".encode()).hexdigest()[:16]
    path = cache / f"reference-{digest}.npz"
    if not path.exists():
        check_folder_writable(cache)  # what is computed would be lost otherwise
        try:
            measured = measure_images(batches, extractor, total)
        except (BadImage, zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ReferenceImagesError(f"{source}: {error}") from error
        measured.save(path)
    return Reference.load(path)


def _open(source: str, side: int) -> tuple[str, Batches, int | None]:
    """A key that changes with the images, the images in batches, and their number where it is known."""
    path = Path(source)
    if source.startswith("hf:"):
        return source, _batched(_dataset_images(source.removeprefix("hf:")), side), None
    if path.is_file() and path.suffix == ".npz":
        stat = path.stat()
        return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}", _npz_batches(path), None
    if not path.is_dir():
        what = f"reference {source} is a file of another kind" if path.exists() else f"there is no reference {source}"
        raise ReferenceImagesError(f"{what}; give an .npz, a folder of images, or hf:NAME[:SPLIT]")
    found = sorted(find_images(path, set(), Counter()))
    if not found:
        raise ReferenceImagesError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    listing = [(str(file.resolve()), *times(status)) for file, status in found]
    paths = [file for file, _ in found]
    return repr(listing), _batched(paths, side), len(paths)


def _batched(sources: Iterator[Path | Image.Image] | list[Path], side: int, batch_size: int = 100) -> Batches:
    iterator = iter(sources)
    while batch := list(itertools.islice(iterator, batch_size)):
        images = torch.stack([_read(image, side) for image in batch])
        yield ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def _read(source: Path | Image.Image, side: int) -> torch.Tensor:
    try:
        return read_image(source, side, 3)
    except BadImage as error:
        name = f"{source} cannot be used" if isinstance(source, Path) else "an image of it cannot be used"
        raise BadImage(f"{name} ({error}); mend it, or take it out of the reference") from error


def _dataset_images(name: str) -> Iterator[Image.Image]:
    from datasets import load_dataset  # only this kind of reference needs it

    repository, _, split = name.partition(":")
    try:
        examples = load_dataset(repository, split=split or "train", streaming=True)
        for example in examples:
            yield example["image"]
    except KeyError as error:
        raise ReferenceImagesError(
            f"the dataset {repository} has no column {error}; images are read from it"
        ) from error
    except (ValueError, OSError) as error:  # datasets' own errors among them
        raise ReferenceImagesError(f"the dataset {name} cannot be read: {error}") from error


def _npz_batches(path: Path, batch_size: int = 100) -> Batches:
    """Images of an `.npz`, without unpacking all of them into memory."""
    # Opened as a whole by now, so that "arr_0" is there.
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(member)
        if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or fortran_order:
            raise ReferenceImagesError(f"{path} has arr_0 of {dtype} {shape}; expected uint8 (N, H, W, 3)")
        size = int(np.prod(shape[1:]))
        for start in range(0, shape[0], batch_size):
            count = min(batch_size, shape[0] - start)
            pixels = np.frombuffer(member.read(count * size), dtype=np.uint8)
            if pixels.size < count * size:
                raise ReferenceImagesError(f"{path} ends before the last of its {shape[0]} images")
            pixels = pixels.reshape(count, *shape[1:])
            yield torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2)
