"""Pictures, features and statistics that the tests of evaluation share."""

import numpy as np
import torch
from PIL import Image

from training.evaluation.features import (
    Features,
)
from training.evaluation.metrics import (
    RunningStatistics,
)


def small_extractor(weights, device):
    """Every kind of features, from fixed random projections of the pixels."""

    def extract(images):
        flat = images.flatten(1).float() / 255
        generator = torch.Generator().manual_seed(0)
        pool, logits, spatial = (torch.randn(flat.shape[1], n, generator=generator) for n in (6, 4, 3))
        return Features(pool=flat @ pool, logits=flat @ logits, spatial=flat @ spatial)

    return extract


def write_pictures(folder, count, side=8, seed=0):
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    paths = [folder / f"{index:03d}.png" for index in range(count)]
    for path, image in zip(paths, pixels, strict=True):
        Image.fromarray(image).save(path)
    return paths


def statistics_of(features, batch_size=7):
    running = RunningStatistics()
    for batch in features.split(batch_size):
        running.add(batch)
    return running.result()
