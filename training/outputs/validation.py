"""The loss on images that are not trained on: always the same images, noises and timesteps, so that numbers of a run,
and of raw and averaged weights, can be compared.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from training.data.batches import GroupBatches, TrainingData, batch_loader
from training.data.image_dataset import ImageData
from training.data.latent_cache import CacheError, LatentCache
from training.data.vae import PixelEncoder
from training.settings.config import ConfigError, TrainConfig, ValidationConfig


def hold_out(data: TrainingData, fraction: float, seed: int) -> tuple[TrainingData, TrainingData]:
    """The images to train on, and those held out: of each class `fraction`, rounded, but never the last image.

    Raises:
        ConfigError: if not a single image would be held out.
    """
    random = np.random.default_rng([seed, 1])
    held: list[np.ndarray] = []
    for label in range(data.num_classes):
        members = random.permutation(np.flatnonzero(data.labels == label))
        held.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    rows = np.sort(np.concatenate(held))
    if not len(rows):
        raise ConfigError(f"validation.fraction is {fraction}: of no class does that make one of its images")
    return data.select(np.setdiff1d(np.arange(len(data)), rows)), data.select(rows)


def held_out_images(data: TrainingData, config: TrainConfig) -> tuple[TrainingData, TrainingData | None]:
    """The images to train on and, if the configuration asks for validation, those to validate with.

    Raises:
        ConfigError, CacheError: if there is nothing to hold out, or if `validation.cache` does not fit.
    """
    held_out: TrainingData | None = None
    if config.validation.cache is not None:
        cache = LatentCache(config.validation.cache)
        cache.check(vae_fingerprint=data.vae_fingerprint, image_size=config.data.image_size, classes=data.classes)
        held_out = cache
    elif config.validation.fraction > 0:
        data, held_out = hold_out(data, config.validation.fraction, config.seed)
    if held_out is None:
        return data, None
    held_out = limited(held_out, config.validation, config.seed)
    if isinstance(held_out, ImageData):
        held_out = held_out.readable()
        if not len(held_out):
            raise CacheError("none of the held-out images can be read")
    return data, held_out


def limited(held_out: TrainingData, validation: ValidationConfig, seed: int) -> TrainingData:
    """At most `validation.images` of the images, drawn once for all."""
    if len(held_out) <= validation.images:
        return held_out
    rows = np.random.default_rng([seed, 2]).permutation(len(held_out))[: validation.images]
    return held_out.select(np.sort(rows))


class Validation:
    """Measures the loss on held-out images. No label is dropped; the last batch is filled up.

    Args:
        held_out: the images.
        config: gives the batch size, the diffusion batch multiplier and the seed.
        accelerator: all its processes take part, each with its share of every batch.
        encode: makes latents of images that are not cached.
    """

    def __init__(
        self, held_out: TrainingData, config: TrainConfig, accelerator: Accelerator, encode: PixelEncoder
    ) -> None:
        self.accelerator, self.encode, self.workers = accelerator, encode, config.data.workers
        self.batches = GroupBatches.of(
            config,
            held_out,
            label_dropout=0.0,
            groups_per_epoch=None,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.count = -(-self.batches.groups_per_epoch // self.batches.global_batch_size)

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        """The mean loss of a module with its weights as they are, in evaluation mode; all processes call this."""
        training = module.training
        module.eval()
        device = self.accelerator.device
        losses = []
        for batch in batch_loader(self.batches, 0, self.count, self.workers):
            batch = self.encode({name: tensor.to(device) for name, tensor in batch.items()})
            with self.accelerator.autocast():
                losses.append(module(**batch).float().mean())
        module.train(training)
        return float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
