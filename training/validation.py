"""The loss on images that are not trained on: always the same images, noises and timesteps, so that numbers of a run,
and of raw and averaged weights, can be compared.
"""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from .config import ConfigError, TrainConfig, ValidationConfig
from .data import GroupBatches
from .latent_cache import LatentCache


def hold_out(cache: LatentCache, fraction: float, seed: int) -> tuple[LatentCache, LatentCache]:
    """The images to train on, and those held out: of each class `fraction`, rounded, but never the last image.

    Raises:
        ConfigError: if not a single image would be held out.
    """
    random = np.random.default_rng([seed, 1])
    held: list[np.ndarray] = []
    for label in range(cache.num_classes):
        members = random.permutation(np.flatnonzero(cache.labels == label))
        held.append(members[: min(round(fraction * len(members)), len(members) - 1)])
    rows = np.sort(np.concatenate(held))
    if not len(rows):
        raise ConfigError(f"validation.fraction is {fraction}: of no class does that make one of its images")
    return cache.select(np.setdiff1d(np.arange(len(cache)), rows)), cache.select(rows)


def held_out_images(cache: LatentCache, config: TrainConfig) -> tuple[LatentCache, LatentCache | None]:
    """The images to train on and, if the configuration asks for validation, those to validate with.

    Raises:
        ConfigError, CacheError: if there is nothing to hold out, or if `validation.cache` does not fit.
    """
    held_out: LatentCache | None = None
    if config.validation.cache is not None:
        held_out = LatentCache(config.validation.cache)
        held_out.check(vae_fingerprint=cache.vae_fingerprint, image_size=config.data.image_size, classes=cache.classes)
    elif config.validation.fraction > 0:
        cache, held_out = hold_out(cache, config.validation.fraction, config.seed)
    return cache, None if held_out is None else limited(held_out, config.validation, config.seed)


def limited(held_out: LatentCache, validation: ValidationConfig, seed: int) -> LatentCache:
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
    """

    def __init__(self, held_out: LatentCache, config: TrainConfig, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.batches = GroupBatches(
            held_out,
            group_size=config.model.images_in_sequence,
            same_image=config.model.scales is not None,
            batch_size=config.data.batch_size,
            diffusion_batch_mul=config.loss.diffusion_batch_mul,
            label_dropout=0.0,
            seed=config.seed,
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
        for index in range(self.count):
            batch = {name: tensor.to(device) for name, tensor in self.batches[index].items()}
            with self.accelerator.autocast():
                losses.append(module(**batch).float().mean())
        module.train(training)
        return float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
