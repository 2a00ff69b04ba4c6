"""Latent images: as token sequences, in the VAE's units, on the path to noise. Pure functions, each with its inverse.

Shapes: B batch, C channels, H/W latent grid, P patch size, S tokens = (H / P) * (W / P).
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from .presets import VAE_DOWNSAMPLE_FACTOR


NUM_TRAIN_TIMESTEPS = 1000
"""The network's timestep is this many times σ, whatever the scheduler."""

Sigma = TypeVar("Sigma", float, torch.Tensor)


def draw_noise(
    shape: Sequence[int],
    generator: torch.Generator | list[torch.Generator] | None,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Standard normal numbers on `device`, drawn where the generator lives, as diffusers' `randn_tensor` draws them.

    That function copies what a generator on the CPU drew in a way that waits until a GPU has worked through its queue.
    This copy does not: the source lies in ordinary memory, which is read before `to` returns.
    """
    first = generator[0] if isinstance(generator, list) else generator
    drawn_on = device if first is None else first.device
    noise: torch.Tensor = randn_tensor(tuple(shape), generator=generator, device=drawn_on, dtype=dtype)
    return noise.to(device, non_blocking=True)


def pack_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut `(B, C, H, W)` latents into `(B, S, C * P * P)` tokens, row by row; within a patch channel-major."""
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpack_latents(tokens: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Assemble `(B, S, C * P * P)` tokens into `(B, C, H, W)` latents: the inverse of `pack_latents`."""
    grid = (height // patch_size, width // patch_size)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch_size)


def noise_latents(latents: torch.Tensor, noise: torch.Tensor, sigma: Sigma) -> torch.Tensor:
    """The path of the flow, x_σ = (1 - σ) x₀ + σ ε (Eq. 4); a tensor of σ is broadcast over the latents."""
    return (1 - sigma) * latents + sigma * noise


def renoise_latents(latents: torch.Tensor, noise: torch.Tensor, sigma: float, sigma_to: float) -> torch.Tensor:
    """Latents of the path at σ to a larger σ': a x + sqrt(σ'² - a² σ²) ε with a = (1 - σ') / (1 - σ).

    a x has the signal of x_σ', and fresh noise fills up to its σ'.
    """
    scale = (1 - sigma_to) / (1 - sigma)
    return scale * latents + (sigma_to**2 - (scale * sigma) ** 2) ** 0.5 * noise


def scale_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """The VAE's latents in the units of the model; without `shift_factor` and `scaling_factor` they are the same."""
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config.get("scaling_factor", 1.0)


def unscale_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """Latents of the model in the VAE's units: the inverse of `scale_latents`."""
    return latents / vae_config.get("scaling_factor", 1.0) + (vae_config.get("shift_factor") or 0.0)


def vae_stride(vae_config: Mapping[str, Any]) -> int:
    """Pixels a side that one latent stands for: a VAE halves its grid after every level but the last.

    The kinds of VAE name their levels differently; of one that names none the stride is that of the published models.
    """
    names = ("block_out_channels", "decoder_block_out_channels", "up_block_out_channels")
    levels = next((vae_config[name] for name in names if vae_config.get(name)), None)
    stride: int = VAE_DOWNSAMPLE_FACTOR if levels is None else 2 ** (len(levels) - 1)
    return stride
