"""The latent cache on disk: what `cache_latents` writes and training reads.

A cache is a folder of

    settings.json                     all that the moments depend on; a folder made with other settings is refused
    checked.json                      names, sizes and times of the images' files, as one digest, when their contents
                                      were last known to be those of the shards
    moments-00000-00000.safetensors   stream and part: mean and std (n, V, C, s, s) as the VAE gives them, labels (n,);
                                      V = 2 views with a mirror, else 1; contents (m,) digests of the images, skipped
                                      ones too (`examples.content_digest`)
    stream-00000.json                 how many parts a stream has
    index.json                        written last: settings, shards and their counts, skipped images and the reason
                                      for each, mean and std of the latents

Shards are memory mapped, so a cache larger than memory trains as well.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from transdiff_pipelines.files import new_file
from transdiff_pipelines.latents import scale_latents

from .errors import CacheError as CacheError


FORMAT = 2


@contextmanager
def reading(shard: Path) -> Iterator[None]:
    """Say what stops the reading of a shard in the `with` block as a CacheError."""
    try:
        shard.open("rb").close()  # safetensors says of a file without permission that it does not exist
        yield
    except (OSError, SafetensorError) as error:
        raise CacheError(
            f"shard {shard} of the latent cache cannot be read: {getattr(error, 'strerror', None) or error}. If it is "
            "lost or damaged, delete what is left of it and run training.cache_latents, which makes it again"
        ) from error


def load_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of a shard.

    Raises:
        CacheError: it cannot be read.
    """
    with reading(path):
        return load_file(path)


class LatentCache:
    """A finished cache, opened for reading: `batches.TrainingData` of encoded images.

    Attributes:
        labels: `(images,)` int64 class index of each image.
        classes: class names in index order.
        latent_shape: `(C, s, s)`.
        num_views: 2 if each image's mirror is cached too, else 1.
        scaling_factor, shift_factor: the VAE's; training latents are (posterior sample - shift) * scaling.
        vae_fingerprint: digest of the VAE the moments come from.
        digest: of the images' contents, labels and classes, and of what was made of them; not of where they lie.

    Raises:
        CacheError: if the folder holds no finished cache of this format.
    """

    draws_per_image = 1

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index_path = self.folder / "index.json"
        if not index_path.is_file():
            state = "unfinished" if self.folder.exists() else "missing"
            raise CacheError(f"latent cache {self.folder} is {state}; run training.cache_latents with the same config")
        index = json.loads(index_path.read_text(encoding="utf-8"))
        self.settings: dict[str, Any] = index["settings"]
        if self.settings["format"] != FORMAT:
            raise CacheError(
                f"latent cache {self.folder} has format {self.settings['format']}; {FORMAT} is expected, which tells "
                "changed images. Delete it and run training.cache_latents again"
            )
        self.classes: list[str] = self.settings["classes"]
        self.scaling_factor: float = self.settings["scaling_factor"]
        self.shift_factor: float = self.settings.get("shift_factor") or 0.0
        self.vae_fingerprint: str = self.settings["vae_fingerprint"]
        self.shards = [load_shard(self.folder / shard["file"]) for shard in index["shards"]]
        contents = torch.cat([shard["contents"] for shard in self.shards]).numpy().tobytes()
        made = [self.settings[name] for name in ("classes", "image_size", "crop", "mirror", "dtype")]
        self.digest = digest_of(hashlib.sha256(contents).hexdigest(), made)
        self._ends = np.cumsum([len(shard["labels"]) for shard in self.shards])
        self.labels: np.ndarray = torch.cat([shard["labels"] for shard in self.shards]).numpy()
        self.rows = np.arange(len(self.labels))
        self.num_views: int = self.shards[0]["mean"].shape[1]
        self.latent_shape: tuple[int, int, int] = tuple(self.shards[0]["mean"].shape[2:])  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def moments(self, image: int, view: int) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation `(C, s, s)` of an image's posterior, float32, unscaled; view 1 is the mirror."""
        position = int(self.rows[image])
        number = int(np.searchsorted(self._ends, position, side="right"))
        shard = self.shards[number]
        row = position - int(self._ends[number])  # counted from the shard's end
        return shard["mean"][row, view].float(), shard["std"][row, view].float()

    def draw(self, image: int, uniform: Sequence[float]) -> dict[str, Tensor]:
        """The moments of an image, or with its mirror cached of one of the two, as the number in [0, 1) wants it."""
        mean, std = self.moments(image, int(uniform[0] * self.num_views))
        return {"mean": mean, "std": std}

    def collect(self, drawn: dict[str, Tensor], normal: Tensor) -> dict[str, Tensor]:
        """Scaled `latents` from stacked draws and standard normal numbers `(B, n, C, s, s)`."""
        samples = drawn["mean"] + drawn["std"] * normal
        return {"latents": scale_latents(samples, self.settings)}

    def select(self, rows: np.ndarray) -> LatentCache:
        """The cache with only these of its images, in this order, and all its classes."""
        selected = LatentCache.__new__(LatentCache)  # the files stay open as they are
        selected.__dict__.update(self.__dict__)
        selected.rows, selected.labels = self.rows[rows], self.labels[rows]
        return selected

    def __reduce__(self) -> tuple[Any, tuple[Path, np.ndarray]]:
        """A worker process maps the files again instead of receiving their contents."""
        return reopen, (self.folder, self.rows)

    def check(self, **expected: Any) -> None:
        """Refuse a cache whose settings differ from `expected`.

        Raises:
            CacheError: naming each setting, its value in the cache and the expected one.
        """
        check_settings(self.folder, self.settings, expected)


def reopen(folder: Path, rows: np.ndarray) -> LatentCache:
    return LatentCache(folder).select(rows)


def read_stamp(folder: Path) -> str | None:
    """What the images' files looked like when the shards were last known to be theirs: `examples.Source.stamp`."""
    path = folder / "checked.json"
    return json.loads(path.read_text(encoding="utf-8"))["stamp"] if path.exists() else None


def check_settings(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Refuse a cache folder whose settings differ from the expected ones."""
    differences = [
        f"{name} is {shorten(found.get(name))} in the cache, {shorten(value)} now"
        for name, value in expected.items()
        if found.get(name) != value
    ]
    if differences:
        raise CacheError(
            f"latent cache {folder} was made with other settings: {'; '.join(differences)}. "
            "Choose another data.cache folder, or delete this one."
        )


def shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def digest_of(*parts: Any) -> str:
    """A digest of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON under a temporary name, then rename it, so that a reader never sees half a file."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
