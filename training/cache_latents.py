"""Encode a folder of images into a latent cache: `accelerate launch -m training.cache_latents --config FILE`.

The folder holds one sub-folder per class; classes are numbered in natural order of their names ("2" before "10"), and
images are taken in natural order too. Work is split over processes by shard, a killed run continues with the shards
that are missing, and images that cannot be read are skipped, counted and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from .config import ConfigError, DataConfig, config_or_exit
from .latent_cache import FORMAT, CacheError, LatentCache, check_settings, module_fingerprint, write_json


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class ImageList:
    """An image folder: class names in index order, and every image with its class index."""

    root: Path
    classes: list[str]
    files: list[tuple[Path, int]]

    def digest(self) -> str:
        """Changes when an image is added, removed, renamed or resized on disk."""
        lines = [f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}" for path, _ in self.files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which "img2" stands before "img10"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def list_images(root: str | Path) -> ImageList:
    """The images of a folder with one sub-folder per class.

    Raises:
        CacheError: if the folder is missing or holds no class folder with images.
    """
    root = Path(root)
    if not root.is_dir():
        raise CacheError(f"image folder {root} does not exist (data.images)")
    folders = sorted((path for path in root.iterdir() if path.is_dir()), key=lambda path: natural_key(path.name))
    found = [(folder.name, sorted_images(folder)) for folder in folders if not folder.name.startswith(".")]
    empty = [name for name, images in found if not images]
    if empty or not found:
        problem = f"class folders without images: {', '.join(empty[:5])}" if empty else "no class folders"
        raise CacheError(f"{root} has {problem}; put images into one sub-folder per class")
    files = [(path, label) for label, (_, images) in enumerate(found) for path in images]
    return ImageList(root, [name for name, _ in found], files)


def sorted_images(folder: Path) -> list[Path]:
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(images, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: halve while twice too large, scale the shorter side to `size`, cut out the middle square."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def image_to_tensor(image: Image.Image) -> Tensor:
    """A grey or RGB image to `(channels, height, width)` in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1).copy())


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """One image, centre cropped, `(channels, size, size)` in [-1, 1]."""
    with Image.open(path) as image:
        return image_to_tensor(center_crop(image.convert("L" if channels == 1 else "RGB"), size))


class ShardWriter:
    """Encodes ranges of images into shards."""

    def __init__(self, images: ImageList, vae: AutoencoderKL, data: DataConfig, device: torch.device) -> None:
        self.images, self.vae, self.data, self.device = images, vae.to(device).eval(), data, device
        self.num_shards = -(-len(images.files) // data.shard_size)

    def path(self, shard: int) -> Path:
        return Path(self.data.cache) / f"moments-{shard:05d}.safetensors"

    def files(self, shard: int) -> list[tuple[Path, int]]:
        return self.images.files[shard * self.data.shard_size : (shard + 1) * self.data.shard_size]

    def write(self, shard: int, progress: tqdm) -> None:
        """Encode one shard and put it in place atomically."""
        moments: list[Tensor] = []
        labels: list[int] = []
        skipped: list[str] = []
        files = self.files(shard)
        for start in range(0, len(files), self.data.encode_batch_size):
            pixels = []
            for path, label in files[start : start + self.data.encode_batch_size]:
                try:
                    pixels.append(read_image(path, self.data.image_size, self.vae.config.in_channels))
                    labels.append(label)
                except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                    skipped.append(path.relative_to(self.images.root).as_posix())
                progress.update()
            if pixels:
                moments.append(self.encode(torch.stack(pixels)))
        if not moments:
            raise CacheError(f"none of the {len(files)} images of shard {shard} can be read, {skipped[0]} among them")
        mean, std = torch.cat(moments).chunk(2, dim=2)
        tensors = {"mean": mean.contiguous(), "std": std.contiguous(), "labels": torch.tensor(labels)}
        temporary = self.path(shard).with_suffix(f".{os.getpid()}.partial")
        save_file(tensors, temporary, metadata={"skipped": "\n".join(skipped)})
        os.replace(temporary, self.path(shard))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Images `(n, c, H, W)` to moments `(n, V, 2 C, s, s)`: mean and std of the image, perhaps of its mirror."""
        views = [pixels, pixels.flip(-1)] if self.data.mirror else [pixels]
        posteriors = [self.vae.encode(view.to(self.device)).latent_dist for view in views]
        moments = torch.stack([torch.cat([posterior.mean, posterior.std], dim=1) for posterior in posteriors], dim=1)
        return moments.to("cpu", getattr(torch, self.data.dtype))


def cache_settings(images: ImageList, vae: AutoencoderKL, data: DataConfig) -> dict[str, Any]:
    """Everything the cached moments depend on."""
    return {
        "format": FORMAT,
        "vae_fingerprint": module_fingerprint(vae, dict(vae.config)),
        "scaling_factor": vae.config.scaling_factor,
        "image_size": data.image_size,
        "crop": "adm_center",
        "mirror": data.mirror,
        "dtype": data.dtype,
        "shard_size": data.shard_size,
        "images": images.digest(),
        "classes": images.classes,
    }


def cache_latents(data: DataConfig) -> LatentCache:
    """Encode `data.images` with `data.vae` into `data.cache`, doing only what is missing.

    Raises:
        CacheError: if the folder holds a cache made with other settings, or if there are no readable images.
    """
    if data.images is None:
        raise ConfigError("data.images is missing: the folder with one sub-folder per class")
    state = PartialState()
    images = list_images(data.images)
    vae = AutoencoderKL.from_pretrained(data.vae)
    writer = ShardWriter(images, vae, data, state.device)
    settings = cache_settings(images, vae, data)
    folder = Path(data.cache)
    with state.main_process_first():
        prepare_folder(folder, settings)
    missing = [shard for shard in range(writer.num_shards) if not writer.path(shard).exists()]
    mine = missing[state.process_index :: state.num_processes]
    total = sum(len(writer.files(shard)) for shard in mine)
    with tqdm(total=total, desc="encoding", unit="image", disable=not state.is_local_main_process) as progress:
        for shard in mine:
            writer.write(shard, progress)
    state.wait_for_everyone()
    if state.is_main_process:
        write_index(writer, settings)
    state.wait_for_everyone()
    return LatentCache(folder)


def prepare_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create the folder, or check that what it holds was made with the same settings."""
    path = folder / "settings.json"
    if path.exists():
        check_settings(folder, json.loads(path.read_text(encoding="utf-8")), settings)
        return
    if folder.exists() and any(folder.glob("moments-*.safetensors")):
        raise CacheError(f"{folder} holds shards but no settings.json; delete it or choose another data.cache folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def write_index(writer: ShardWriter, settings: dict[str, Any]) -> None:
    """Write index.json: the last step, which makes the cache a finished one."""
    shards: list[dict[str, Any]] = []
    skipped: list[str] = []
    total = total_square = 0.0
    numbers = 0
    for shard in range(writer.num_shards):
        with safe_open(writer.path(shard), framework="pt") as file:
            mean, std = file.get_tensor("mean").double(), file.get_tensor("std").double()
            names = (file.metadata() or {}).get("skipped", "")
        shards.append({"file": writer.path(shard).name, "count": len(mean)})
        skipped += names.split("\n") if names else []
        total += mean.sum().item()
        total_square += (mean.square() + std.square()).sum().item()
        numbers += mean.numel()
    latent_std = (total_square / numbers - (total / numbers) ** 2) ** 0.5
    index = {"settings": settings, "shards": shards, "skipped": skipped, "latent_std": latent_std}
    write_json(Path(writer.data.cache) / "index.json", index)


def report(cache: LatentCache) -> str:
    """A few lines about a finished cache."""
    index = json.loads((cache.folder / "index.json").read_text(encoding="utf-8"))
    skipped, std = index["skipped"], index["latent_std"]
    lines = [
        f"{len(cache)} images of {cache.num_classes} classes in {cache.folder}, {cache.num_views} view(s) each",
        f"latents {cache.latent_shape}: std {std:.4f}, scaled {std * cache.scaling_factor:.4f} "
        f"(about 1 is wanted; 1 / std is {1 / std:.4f}, the VAE's scaling factor {cache.scaling_factor:.4f})",
    ]
    if skipped:
        lines.append(f"skipped {len(skipped)} unreadable image(s): {', '.join(skipped[:20])}")
    return "\n".join(lines)


def main() -> None:
    config = config_or_exit("training.cache_latents")
    try:
        cache = cache_latents(config.data)
    except (CacheError, ConfigError) as error:
        print(f"training.cache_latents: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    if PartialState().is_main_process:
        print(report(cache))


if __name__ == "__main__":
    main()
