"""What the pipelines ask of a VAE. Whatever has a fitting `decode` serves, diffusers' tiny decoders among them.

Shapes: B images, C latent channels, s latent side, H = W pixels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import nn


def vae_config(vae: Any) -> Mapping[str, Any]:
    """The configuration of a VAE; empty for a model without one, and for no VAE at all."""
    config: Mapping[str, Any] = getattr(vae, "config", {})
    return config


def check_vae(vae: Any, latent_channels: int | None) -> None:
    """Raise unless the VAE decodes latents of `latent_channels` channels, as far as its configuration tells.

    Raises:
        TypeError: it has no `decode`, or is no model of diffusers, from which pipelines want `device` and `dtype`.
        ValueError: it decodes another number of channels, or videos.
    """
    if isinstance(vae, type) or not callable(getattr(vae, "decode", None)):
        raise TypeError(f"vae is {describe(vae)}; expected a VAE of diffusers, or another model with decode(latents)")
    vae = getattr(vae, "_orig_mod", vae)  # compiled
    if not isinstance(vae, ModelMixin):
        raise TypeError(f"vae is {describe(vae)}, which decodes, but is no diffusers.ModelMixin; make it one")
    if any(isinstance(part, nn.Conv3d) for part in vae.modules()):
        raise ValueError(
            f"{type(vae).__name__} decodes videos; use a VAE of images, the one the model was trained with"
        )
    own = vae_config(vae).get("latent_channels")
    if None not in (own, latent_channels) and own != latent_channels:
        raise ValueError(
            f"the transformer makes {latent_channels} latent channels, the VAE decodes {own}; use the VAE the model "
            "was trained with"
        )


def describe(component: object) -> str:
    """A component in an error: a class that was passed in place of an instance is the usual mistake."""
    if isinstance(component, type):
        return f"the class {component.__name__}, not an instance of it"
    return f"a {type(component).__name__}"


def encode_to_mode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` in [-1, 1] to the VAE's latents `(B, C, s, s)`, in float32: the mode of their posterior.

    Raises:
        ValueError: the VAE cannot encode.
    """
    if not callable(getattr(vae, "encode", None)):
        raise ValueError(f"{type(vae).__name__} decodes and does not encode; pass scaled latents in place of images")
    encoded = vae.encode(pixels.to(vae.dtype))
    if hasattr(encoded, "latent_dist"):
        latents = encoded.latent_dist.mode()
    else:  # deterministic ones: AutoencoderTiny, VQModel and AutoencoderDC
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent
    return latents.float()


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The VAE's latents `(B, C, s, s)` to pixels `(B, 3, H, W)` in [-1, 1]."""
    decoded = vae.decode(latents.to(vae.dtype))
    pixels: torch.Tensor = decoded if isinstance(decoded, torch.Tensor) else decoded[0]
    return pixels
