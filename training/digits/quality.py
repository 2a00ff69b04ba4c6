"""Quality of generated digits, measured against the real ones.

    python -m training.digits.quality --model FOLDER --data data/digits --split test --grid grid.png

All measures are taken on 8x8 pixels in 0..16 (the mean over channels and over 4x4 blocks of the 32x32 image), the
form in which the data were published:

* recognition: accuracy of a support vector machine trained on real digits;
* nearest: mean distance to the nearest training image (a memorising model is too near, a noisy one too far);
* copies: share of images nearer to a training image than all but 1% of the real split are;
* variance: variance within a class, averaged over classes (a collapsed model has too little);
* Frechet distance between the 64-dimensional Gaussians fitted to the two sets of pixels.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.svm import SVC

from training.digits.export import DATA_MAXIMUM, SPLITS, block_means

NUM_CLASSES = 10


def load_split(data: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read `data/split/LABEL/*.png` into images `(N, 32, 32, 3)` in [0, 1] and labels `(N,)`.

    Raises:
        FileNotFoundError: there are no such images.
    """
    paths = sorted(Path(data, split).glob("[0-9]/*.png"))
    if not paths:
        raise FileNotFoundError(
            f"no digits under {Path(data, split)}; write them with `python -m training.digits.export --output {data}`"
        )
    images = [np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255 for path in paths]
    return np.stack(images), np.array([int(path.parent.name) for path in paths])


def pooled_pixels(images: np.ndarray) -> np.ndarray:
    """Pool images `(N, 32, 32, C)` in [0, 1] to pixels `(N, 64)` in 0..16."""
    if images.ndim != 4 or images.shape[1:3] != (32, 32):
        raise ValueError(f"images have the shape {images.shape}; expected (N, 32, 32, channels)")
    return block_means(images.astype(np.float64).mean(axis=-1)).reshape(len(images), -1) * DATA_MAXIMUM


def fit_recogniser(pixels: np.ndarray, labels: np.ndarray) -> SVC:
    """Support vector machine with an RBF kernel on pixels `(N, 64)`, fit on real digits."""
    return SVC(gamma=0.001, C=10).fit(pixels, labels)


def recognition(recogniser: SVC, pixels: np.ndarray, labels: np.ndarray) -> float:
    """Share of images in [0, 1] recognised as the digit they should show."""
    return float(recogniser.score(pixels, labels))


def within_class_variance(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Total variance of the pixels `(N, 64)` of a class, averaged over the classes present."""
    return float(np.mean([pixels[labels == label].var(axis=0, ddof=1).sum() for label in np.unique(labels)]))
