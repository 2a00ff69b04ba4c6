"""Train the small VAE of the bundled digits model.

    python -m training.digits.train_vae --data data/digits --output runs/digits-vae

This is `training.train_vae`, whose report also tells how well the reconstructed digits are recognised.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from training import train_vae
from training.digits.quality import fit_recogniser, load_split, pooled_pixels, recognition
from training.evaluation.quality import within_class_variance


def judge(options: argparse.Namespace) -> train_vae.Judge:
    """Measures of the digits in the validation split, by a recogniser that is fit on the training split."""
    train_images, train_labels = load_split(options.data, "train")
    recogniser = fit_recogniser(pooled_pixels(train_images), train_labels)
    _, labels = load_split(options.data, "validation")

    def measures(images: np.ndarray, reconstructions: np.ndarray) -> dict[str, Any]:
        real, rebuilt = pooled_pixels(images), pooled_pixels(reconstructions)
        ratio = within_class_variance(rebuilt, labels) / within_class_variance(real, labels)
        return {
            "recognition_real": recognition(recogniser, real, labels),
            "recognition_reconstructed": recognition(recogniser, rebuilt, labels),
            "within_class_variance_ratio": ratio,
        }

    return measures


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    train_vae.main(arguments, "training.digits.train_vae", judge)


if __name__ == "__main__":
    main()
