"""The images that are held out of training, to measure the loss on."""

from __future__ import annotations

import numpy as np

from training.settings.config import ConfigError, TrainConfig, ValidationConfig

from .batches import TrainingData
from .errors import DataError
from .image_dataset import ImageData
from .latent_cache import LatentCache


def hold_out(data: TrainingData, fraction: float, seed: int) -> tuple[TrainingData, TrainingData]:
    """The images to train on, and those held out: `fraction` of each class, rounded, but at most all images but one.

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
        ConfigError, DataError: if there is nothing to hold out, or if `validation.cache` does not fit.
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
            raise DataError("none of the held-out images can be read")
    return data, held_out


def limited(held_out: TrainingData, validation: ValidationConfig, seed: int) -> TrainingData:
    """At most `validation.images` of the images, drawn once for all."""
    if len(held_out) <= validation.images:
        return held_out
    rows = np.random.default_rng([seed, 2]).permutation(len(held_out))[: validation.images]
    return held_out.select(np.sort(rows))
