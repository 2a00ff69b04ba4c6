"""Between pixels and latents, and the noise that latents begin as.

Shapes: B images, N images in an AR sequence, C latent channels, s latent side, H = W pixels.
"""

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..latents import draw_noise, scale_latents, unscale_latents
from ..models import TransDiffTransformer2DModel
from .checks import check_generator, check_latents, check_present
from .reference_images import ReferenceImages, load_references
from .vae import decode, encode_to_mode, vae_config


class ImageLatentsMixin:
    """Noise to begin with, images to latents and back."""

    transformer: TransDiffTransformer2DModel
    scheduler: SchedulerMixin
    vae: Any
    vae_scale_factor: int
    image_processor: VaeImageProcessor
    _execution_device: torch.device

    def prepare_latents(
        self,
        batch_size: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Initial noise `(B, C, s, s)` in float32, drawn or taken from `latents` (of unit variance).

        Raises:
            TypeError, ValueError: the generator or the latents are not of that batch.
        """
        shape = self.latents_shape(batch_size)
        check_latents(latents, shape)
        check_generator(generator, batch_size)
        device = self._execution_device
        if latents is None:
            latents = draw_noise(shape, generator, device, torch.float32)
        return latents.to(device, torch.float32) * getattr(self.scheduler, "init_noise_sigma", 1.0)

    @property
    def image_side(self) -> int:
        """Height and width, in pixels, of the images that this model makes and edits."""
        return self.transformer.config.sample_size * self.vae_scale_factor

    def latents_shape(self, batch_size: int) -> tuple[int, ...]:
        """`(B, C, s, s)` of the latents of so many images."""
        config = self.transformer.config
        return (batch_size, config.in_channels, config.sample_size, config.sample_size)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels `(B, 3, H, W)` in [0, 1] to scaled latents `(B, C, s, s)` in float32.

        The posterior's mode, not a sample as in diffusers' own pipelines: it takes no random numbers, so a seed keeps
        its noise, and what an edit knows stays as near to the image as the VAE can.
        """
        check_present(vae=self.vae)
        latents = encode_to_mode(self.vae, (2 * pixels - 1).to(self._execution_device))
        expected = self.latents_shape(len(pixels))
        if tuple(latents.shape) != expected:
            raise ValueError(
                f"{type(self.vae).__name__} encodes images of {pixels.shape[-1]} pixels to {tuple(latents.shape)}, "
                f"and the model takes {expected}; use the VAE the model was trained with, or pass scaled latents"
            )
        return scale_latents(latents, vae_config(self.vae))

    def encode_references(self, reference_images: ReferenceImages, num_labels: int, num_ar_steps: int) -> torch.Tensor:
        """Scaled latents `(B, n, C, s, s)` of the images that start the AR sequences of B labels.

        See `reference_images.load_references` for what they may be, and for errors.
        """
        shape = self.latents_shape(1)[1:]
        side = None if self.vae is None else self.image_side
        images = load_references(reference_images, num_labels, num_ar_steps, shape, side)
        latents = [image if image.shape == shape else self.encode_image(image[None])[0] for image in images]
        return torch.stack(latents).to(self._execution_device, torch.float32).unflatten(0, (num_labels, -1))

    def decode_latents(self, latents: torch.Tensor, output_type: str = "pil") -> Any:
        """Scaled latents `(B, C, s, s)` to images of the `output_type`; "latent" gives them back as they are."""
        if output_type == "latent":
            return latents
        check_present(vae=self.vae)
        images = decode(self.vae, unscale_latents(latents, vae_config(self.vae)))
        return self.image_processor.postprocess(images, output_type=output_type)
