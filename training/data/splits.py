"""Images divided into those to train on, to tune settings on (validation) and to report on (test)."""

from __future__ import annotations

import numpy as np
from sklearn.model_selection import train_test_split


SPLITS = ("train", "validation", "test")


def split_indices(labels: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Sorted indices by split name: 70% train, 10% validation, 20% test of each class, the same for a seed.

    Raises:
        ValueError: if a class has too few images to be in every split.
    """
    everything = np.arange(len(labels))
    rest, test = train_test_split(everything, test_size=0.2, stratify=labels, random_state=seed)
    train, validation = train_test_split(rest, test_size=0.125, stratify=labels[rest], random_state=seed)
    parts = dict(zip(SPLITS, (train, validation, test), strict=True))
    classes = np.unique(labels)
    for name, part in parts.items():
        if missing := sorted(set(classes.tolist()) - set(labels[part].tolist())):
            raise ValueError(f"class {missing[0]} has too few images to have one in {name}")
    return {name: np.sort(part) for name, part in parts.items()}
