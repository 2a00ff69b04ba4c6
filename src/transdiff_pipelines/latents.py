"""Latent images: as token sequences, in the VAE's units, on the path to noise. Pure functions, each with its inverse.

Shapes: B batch, C channels, H/W latent grid, P patch size, S tokens = (H / P) * (W / P).
"""

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F


NUM_TRAIN_TIMESTEPS = 1000
"""The network's timestep is this many times σ, whatever the scheduler."""

Sigma = TypeVar("Sigma", float, torch.Tensor)


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
    """The VAE's latents in the units of the model; a VAE without a `shift_factor` has the shift 0."""
    return (latents - (vae_config.get("shift_factor") or 0.0)) * vae_config["scaling_factor"]


def unscale_latents(latents: torch.Tensor, vae_config: Mapping[str, Any]) -> torch.Tensor:
    """Latents of the model in the VAE's units: the inverse of `scale_latents`."""
    return latents / vae_config["scaling_factor"] + (vae_config.get("shift_factor") or 0.0)


def vae_stride(vae_config: Mapping[str, Any]) -> int:
    """Pixels a side that one latent stands for: the VAE halves its grid after every level but the last."""
    stride: int = 2 ** (len(vae_config["block_out_channels"]) - 1)
    return stride
