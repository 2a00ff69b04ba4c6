"""The VAE of a run: loading it, telling it from others, and encoding images while training.

Shapes: B groups, n different images per group, N images per group, c pixel channels, H side in pixels, C latent
channels, s latent side.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.settings.config import ConfigError, require
from transdiff_pipelines.generation import without_loading_bars
from transdiff_pipelines.hub_access import check_hub_has
from transdiff_pipelines.latents import scale_latents, vae_stride

from .errors import DataError


# Names that begin with these mean folders, as in the configurations, and are not looked for on the Hub.
OWN_FOLDERS = ("outputs", "checkpoints", "datasets", "src")


def load_vae(name: str | None, setting: str = "data.vae") -> AutoencoderKL:
    """The VAE of a folder, or of a Hub repository `org/name`, perhaps in a sub-folder: `org/name/vae`.

    `setting` is what named it, for the errors.

    Raises:
        ConfigError: if there is no name.
        DataError: if it is in neither place.
    """
    if not name:
        raise ConfigError(f"{setting} is missing: the folder or Hub name of an AutoencoderKL")
    if not Path(name).exists() and (name[0] in "./~" or Path(name).parts[0] in OWN_FOLDERS):
        raise DataError(f"{setting}: there is no folder {name}; name one with an AutoencoderKL, or a Hub repository")
    repository, _, subfolder = name.rpartition("/")
    is_nested = not Path(name).exists() and repository.count("/") == 1
    try:
        if not Path(name).exists():
            check_hub_has(repository if is_nested else name)
        with without_loading_bars():
            if is_nested:
                return AutoencoderKL.from_pretrained(repository, subfolder=subfolder)
            return AutoencoderKL.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{setting} {name!r} cannot be loaded: {reason}") from error


def module_fingerprint(module: nn.Module, config: dict[str, Any]) -> str:
    """A digest of a model's configuration and weights, the same wherever the model is stored."""
    public = {key: value for key, value in config.items() if not key.startswith("_")}
    return tensors_digest(module.state_dict(), json.dumps(public, sort_keys=True, default=str))


def tensors_digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    """A digest of tensors, their names and a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def check_vae(vae: AutoencoderKL, image_size: int) -> None:
    stride, channels = vae_stride(vae.config), vae.config.in_channels
    require(image_size % stride == 0, f"data.image_size is {image_size}; the VAE needs a multiple of {stride}")
    require(channels in (1, 3), f"data.vae takes images of {channels} channels; grey (1) and RGB (3) can be cached")


def latent_shape(vae: AutoencoderKL, image_size: int) -> tuple[int, int, int]:
    """`(C, s, s)` of an image of `image_size` pixels a side."""
    side = image_size // vae_stride(vae.config)
    return vae.config.latent_channels, side, side


class PixelEncoder:
    """Makes batches of latents out of batches of pixels, on the device; those that hold latents pass through.

    Args:
        vae: frozen, on its device.
        chunk: images encoded at once.
        autocast: whether the VAE runs in bfloat16. Not in float16, which many VAEs overflow.
    """

    def __init__(self, vae: AutoencoderKL, chunk: int, autocast: bool) -> None:
        self.vae, self.chunk, self.autocast = vae, chunk, autocast

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Replace `pixels` `(B, n, c, H, H)` and `posterior` `(B, n, C, s, s)`, the normal numbers that draw from the
        posterior, by `latents` `(B, N, C, s, s)` in scaled units.
        """
        if "pixels" not in batch:
            return batch
        pixels, normal = batch["pixels"], batch["posterior"]
        samples = torch.cat([
            self._sample(images, numbers)
            for images, numbers in zip(
                pixels.flatten(0, 1).split(self.chunk), normal.flatten(0, 1).split(self.chunk), strict=True
            )
        ])  # fmt: skip
        latents = scale_latents(samples, self.vae.config)
        num_images = len(batch["timesteps"])  # of which all are the same, if only one was read
        kept = {name: batch[name] for name in ("labels", "timesteps", "noise")}
        return kept | {"latents": latents.view_as(normal).expand(-1, num_images, -1, -1, -1)}

    def _sample(self, pixels: Tensor, normal: Tensor) -> Tensor:
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=self.autocast):
            posterior = self.vae.encode(pixels).latent_dist
        return posterior.mean.float() + posterior.std.float() * normal
