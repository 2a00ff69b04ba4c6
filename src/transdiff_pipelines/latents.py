"""Latent images as token sequences, and back: pure functions.

Shapes: B batch, C channels, H/W latent grid, P patch size, S tokens = (H / P) * (W / P).
"""

import torch
import torch.nn.functional as F


def pack_latents(latents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cut `(B, C, H, W)` latents into `(B, S, C * P * P)` tokens, row by row; within a patch channel-major."""
    return F.pixel_unshuffle(latents, patch_size).flatten(2).transpose(1, 2)


def unpack_latents(tokens: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """Assemble `(B, S, C * P * P)` tokens into `(B, C, H, W)` latents: the inverse of `pack_latents`."""
    grid = (height // patch_size, width // patch_size)
    return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch_size)
