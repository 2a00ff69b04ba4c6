"""A small VAE for small images, and its training: `training.train_vae` is the command.

The images are all held in memory, on the device. Shapes: N images, H their side in pixels, C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor
from tqdm import tqdm

from training.data.errors import DataError
from training.distributed.interruption import StopRequest, TrainingInterrupted, TrainingStopped
from transdiff_pipelines.files import new_file


WIDTHS = (16, 32, 64, 64)
"""Channels of the bundled digits model's VAE, at full resolution and after each halving."""

LATENT_CHANNELS = 4

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}

_CHUNK = 64  # images that are encoded at once where there is no batch size


def build_vae(
    latent_channels: int = LATENT_CHANNELS, image_size: int = 32, widths: Sequence[int] = WIDTHS
) -> AutoencoderKL:
    """A fresh autoencoder: `(B, 3, H, H)` images, `(B, C, h, h)` latents with h = H / 2^(len(widths) - 1).

    With the default widths it has about a million parameters, and h = H / 8.
    """
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=tuple(widths),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


@dataclass
class VAESettings:
    """How a VAE is trained; the defaults are those of the bundled digits model.

    Attributes:
        loss: of the reconstruction, averaged over elements: `mse`, or `l1`, which keeps edges of flat colours sharper.
        kl_weight: of the posterior's KL divergence from the normal distribution, averaged over elements.
        mirror: whether each image is mirrored half of the time.
        bfloat16: whether the network runs in bfloat16, by autocast; weights, losses and optimiser stay in float32.
        decoder_only: whether the encoder stays as it is, and with it every latent; the KL divergence then has no part.
    """

    steps: int = 3500
    batch_size: int = 32
    learning_rate: float = 2e-3
    kl_weight: float = 3e-3
    loss: Literal["mse", "l1"] = "mse"
    mirror: bool = False
    bfloat16: bool = False
    decoder_only: bool = False


class VAETrainer:
    """Trains a VAE on images that are all in memory; what it is made of can be saved and read again, exactly.

    Args:
        vae: trained in place, on its device.
        images: `(N, 3, H, H)` in [-1, 1].
        settings: of the whole training.
        seed: of the order of the images and of the posterior's noise, both drawn on the CPU.
    """

    def __init__(self, vae: AutoencoderKL, images: Tensor, settings: VAESettings, seed: int = 0) -> None:
        self.vae, self.images, self.settings = vae, images.to(vae.device), settings
        self.generator = torch.Generator().manual_seed(seed)
        if settings.decoder_only:
            for part in (vae.encoder, vae.quant_conv):
                part.requires_grad_(False)
        self._trained = [weight for weight in vae.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self._trained, lr=settings.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer,
            num_warmup_steps=min(100, settings.steps // 10),
            num_training_steps=settings.steps,
        )
        self.step = 0
        self._rest = torch.empty(0, dtype=torch.long)  # of the epoch's order, what is still to come

    def run(self, checkpoint: Path | None = None, every: int = 500) -> None:
        """Train to the last step; with a `checkpoint`, go on from the one that is there, and save to it on the way.

        Raises:
            DataError: the checkpoint is that of other settings or images, or cannot be read.
            TrainingStopped: the loss is not finite.
            TrainingInterrupted: Ctrl-C or SIGTERM came; the checkpoint, if there is one, was saved before.
        """
        if checkpoint is not None and checkpoint.exists():
            self.load(checkpoint)
        self.vae.train()
        stop = StopRequest()
        steps = range(self.step, self.settings.steps)
        with stop.awaited(), tqdm(steps, "vae", self.settings.steps, initial=self.step, mininterval=5) as progress:
            for _ in progress:
                error, kl = self._train_step()
                progress.set_postfix(error=f"{error:.5f}", kl=f"{kl:.3f}", refresh=False)
                if checkpoint is not None and (stop.made or self.step % every == 0):
                    self.save(checkpoint)
                if stop.made:
                    where = (
                        "" if checkpoint is None else f", which is saved in {checkpoint}; repeat the command to go on"
                    )
                    raise TrainingInterrupted(f"interrupted after step {self.step}{where}")
        self.vae.eval()

    def _train_step(self) -> tuple[float, float]:
        original = self._next_batch()
        with torch.autocast(original.device.type, torch.bfloat16, enabled=self.settings.bfloat16):
            posterior = self.vae.encode(original).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=self.generator).to(original.device)
            reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample
        error = LOSSES[self.settings.loss](reconstruction.float(), original)
        kl = posterior.kl().float().sum() / posterior.mean.numel()
        self.step += 1
        if not torch.isfinite(error + kl):
            raise TrainingStopped(f"the loss of step {self.step} is not finite; lower --learning-rate and run again")
        (error if self.settings.decoder_only else error + self.settings.kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()
        return error.item(), kl.item()

    def _next_batch(self) -> Tensor:
        """`(B, 3, H, H)`, drawn without replacement in each epoch."""
        if len(self._rest) == 0:
            self._rest = torch.randperm(len(self.images), generator=self.generator)
        chosen, self._rest = self._rest[: self.settings.batch_size], self._rest[self.settings.batch_size :]
        batch = self.images[chosen.to(self.images.device)]
        if self.settings.mirror:
            is_mirrored = torch.rand(len(batch), 1, 1, 1, generator=self.generator) < 0.5
            batch = torch.where(is_mirrored.to(batch.device), batch.flip(-1), batch)
        return batch

    def save(self, path: Path) -> None:
        """Write everything that the rest of the training depends on but the images."""
        with new_file(path) as file:
            torch.save(
                {
                    "settings": self._identity(),
                    "step": self.step,
                    "rest": self._rest.clone(),
                    "generator": self.generator.get_state(),
                    "vae": self.vae.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "schedule": self.schedule.state_dict(),
                },
                file,
            )

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            DataError: it is that of other settings or images, or cannot be read.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            settings = state["settings"]
        except Exception as error:
            raise DataError(f"{path} is no checkpoint of a VAE that can be read; remove it to start anew") from error
        for name, value in self._identity().items():
            if settings.get(name) != value:
                raise DataError(
                    f"{path} was saved with {name} {settings.get(name)!r}, now it is {value!r}; repeat the options of "
                    "that run to go on with it, or remove the file to start anew"
                )
        self.step, self._rest = state["step"], state["rest"]
        self.generator.set_state(state["generator"])
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be one of this training."""
        config = self.vae.config
        return asdict(self.settings) | {
            "number of images": len(self.images),
            "image size": self.images.shape[-1],
            "latent channels": config.latent_channels,
            "widths": list(config.block_out_channels),
        }


def to_tensor(images: np.ndarray) -> Tensor:
    """`(N, H, W, 3)` images in [0, 1] to a `(N, 3, H, W)` tensor in [-1, 1], which is what the VAE takes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def from_tensor(images: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: Tensor) -> dict[str, Any]:
    """Mean and standard deviation of posterior samples, overall and by channel, and the posterior's own part in it."""
    posteriors = [vae.encode(chunk).latent_dist for chunk in _chunks(vae, images)]
    mean, std = (torch.cat([getattr(posterior, name).cpu() for posterior in posteriors]) for name in ("mean", "std"))
    sample = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    return {
        "std": sample.std().item(),
        "mean": sample.mean().item(),
        "std_by_channel": [round(value, 3) for value in sample.std(dim=(0, 2, 3)).tolist()],
        "mean_by_channel": [round(value, 3) for value in sample.mean(dim=(0, 2, 3)).tolist()],
        "posterior_std_by_channel": [round(value, 3) for value in std.mean(dim=(0, 2, 3)).tolist()],
    }


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode (through the posterior's mean) `(N, H, W, 3)` images in [0, 1]."""
    chunks = _chunks(vae, to_tensor(images))
    return from_tensor(torch.cat([vae.decode(vae.encode(chunk).latent_dist.mean).sample.cpu() for chunk in chunks]))


def _chunks(vae: AutoencoderKL, images: Tensor) -> Iterator[Tensor]:
    return (chunk.to(vae.device) for chunk in images.split(_CHUNK))
