"""Measures of drawn emoji against the real drawings: recognition, Fréchet distance, spread, copies, hands.

Two spaces are measured in. Features are those of the recogniser (`training.emoji.recogniser`), pixels the means of a
grid of 16x16 squares of the picture in 0..255, and distances of pixels are root mean squares over the squares and
colours. The hand of a picture is the set whose drawing of the class is nearest to it in pixels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import pdist

from training.data.errors import DataError
from training.data.labels import listed
from training.data.sources import FolderSource
from training.data.splits import SPLITS
from training.digits.export import block_means
from training.evaluation.metrics import NEIGHBOURS, precision_recall
from training.evaluation.quality import (
    Measure,
    frechet_distance,
    frechet_error,
    nearest_neighbour_distance,
    within_class_variance,
)

from .recogniser import Recogniser


SQUARES = 16
COPY_QUANTILE = 0.01

MEASURES = {
    "recognition": Measure("recognised, %", 100, 1),
    "of_ceiling": Measure("recognised, % of the ceiling", 100, 1),
    "top5": Measure("among the five highest classes, %", 100, 1),
    "frechet_train": Measure("Fréchet distance of features to the training drawings", 1, 3),
    "frechet_held_out": Measure("Fréchet distance of features to the held-out drawings", 1, 3),
    "precision": Measure("precision, to the training drawings, %", 100, 1),
    "recall": Measure("recall, of the training drawings, %", 100, 1),
    "feature_variance": Measure("variance of features within a class", 1, 2),
    "pixel_variance": Measure("variance of pixels within a class, per square and colour", 1, 0),
    "nearest": Measure("distance to the nearest training drawing", 1, 2),
    "copies": Measure("closer to one than 99% of the held-out drawings, %", 100, 1),
    "closer_than_half": Measure("closer to one than half of the held-out drawings, %", 100, 1),
    "reconstructions": Measure("as close to one as 95% of the VAE's reconstructions of them, %", 100, 1),
    "diversity": Measure("distance of features between independent pictures of a class", 1, 3),
    "sequence_diversity": Measure("the same inside of a sequence", 1, 3),
    "hands": Measure("different hands in four independent pictures", 1, 2),
    "sequence_hands": Measure("different hands in a sequence", 1, 2),
}


class Drawings:
    """The real drawings of one split.

    Args:
        data: folder that `training.emoji.render` wrote.
        split: one of SPLITS.
        classes: all names of classes, in the order of their labels; None: those of this split.

    Attributes:
        images: `(N, H, W, 3)`, uint8.
        labels: `(N,)`.
        hands: the set of each drawing.
        digest: of the files' names and sizes.

    Raises:
        DataError: if there are none, or their sizes or classes differ.
    """

    def __init__(self, data: Path, split: str, classes: Sequence[str] | None = None) -> None:
        try:
            source = FolderSource(data / split)
        except DataError as error:
            raise DataError(
                f"{error}; `python -m training.emoji.render --output {data}` writes the drawings"
            ) from None
        self.classes = source.classes if classes is None else list(classes)
        if unknown := sorted(set(source.classes) - set(self.classes)):
            raise DataError(
                f"{data / split} has classes that training has not: {listed(unknown)}; render the set anew"
            )
        images = []
        for path, _ in source.files:
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB")))
        if len({image.shape for image in images}) > 1:
            raise DataError(f"the drawings in {data / split} have several sizes; render the set anew")
        self.images = np.stack(images)
        names = [source.classes[label] for _, label in source.files]
        self.labels = np.array([self.classes.index(name) for name in names])
        self.hands = [path.stem for path, _ in source.files]
        self.digest = source.digest


def pixels(images: np.ndarray) -> np.ndarray:
    """Images `(N, H, W, 3)`, uint8 or in [0, 1], as rows `(N, 768)` whose Euclidean distance is the RMS of a value.

    Raises:
        DataError: if the side is no multiple of 16.
    """
    if images.ndim != 4 or images.shape[1] % SQUARES or images.shape[1] != images.shape[2]:
        raise DataError(f"images have the shape {images.shape}; expected squares of a side that {SQUARES} divides")
    scale = 1 if images.dtype == np.uint8 else 255
    planes = images.transpose(0, 3, 1, 2).astype(np.float64) * scale
    rows = block_means(planes, images.shape[1] // SQUARES).reshape(len(images), -1)
    return rows / np.sqrt(rows.shape[1])


class Judge:
    """What pictures of emoji are compared with.

    Args:
        data: folder that `training.emoji.render` wrote.
        split: "validation" or "test": the held-out drawings to compare with. They are of half of the classes, so the
            distance to them is that of the pictures of those classes.
        recogniser: trained on the training split of the same data.

    Attributes:
        accuracy: of the recogniser, for each held-out split; the ceiling is that of both together, in which each
            class is once.
    """

    def __init__(self, data: Path, split: str, recogniser: Recogniser) -> None:
        self.recogniser = recogniser
        self.split = split
        self.train = Drawings(data, "train")
        if recogniser.classes != self.train.classes:
            raise DataError("the recogniser was trained on other classes; name another file for one of these")
        if recogniser.trained_on != self.train.digest:
            raise DataError("the recogniser was trained on other drawings; name another file for one of these")
        held_out = {name: Drawings(data, name, self.train.classes) for name in SPLITS[1:]}
        self.held_out = held_out[split]
        self.train_features, _ = recogniser.judge(self.train.images)
        self.train_pixels = pixels(self.train.images)
        right = {name: _right(recogniser.judge(of.images)[1], of.labels) for name, of in held_out.items()}
        self.accuracy = {name: float(those.mean()) for name, those in right.items()}
        self.ceiling = float(np.concatenate(list(right.values())).mean())
        self.held_out_features, self.held_out_scores = recogniser.judge(self.held_out.images)
        held_out_pixels = pixels(self.held_out.images)
        self.distances = nearest_neighbour_distance(held_out_pixels, self.train_pixels)
        # The six drawings of each class of the split, for what can be said of several drawings of a class alone.
        same = self.same = np.isin(self.train.labels, self.held_out.labels)
        self.all_labels = np.concatenate([self.train.labels[same], self.held_out.labels])
        self.all_features = np.concatenate([self.train_features[same], self.held_out_features])
        self.all_pixels = np.concatenate([self.train_pixels[same], held_out_pixels])

    def measure(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Measures of pictures `(N, H, W, 3)` in [0, 1] with the labels `(N,)` that they should show."""
        features, scores = self.recogniser.judge(images)
        held_out = np.isin(labels, self.held_out.labels)
        recognition = float(_right(scores, labels).mean())
        measured = {
            "recognition": recognition,
            "of_ceiling": recognition / self.ceiling,
            "top5": float(_right(scores, labels, 5).mean()),
            "frechet_train": frechet_distance(features, self.train_features),
            **self._precision_recall(features),
            **self._closeness(nearest_neighbour_distance(pixels(images), self.train_pixels)),
        }
        if held_out.sum() > 1:
            measured["frechet_held_out"] = frechet_distance(features[held_out], self.held_out_features)
            measured["frechet_held_out_error"] = frechet_error(features[held_out], self.held_out_features)
        return measured | _spread(features, pixels(images), labels)

    def measure_real(self) -> dict[str, float]:
        """The same of the held-out drawings; of spread, that of all drawings of their classes.

        The distance to the held-out drawings is that of the training drawings of their classes.
        """
        return {
            "recognition": self.ceiling,
            "of_ceiling": 1.0,
            "top5": float(_right(self.held_out_scores, self.held_out.labels, 5).mean()),
            "frechet_train": frechet_distance(self.held_out_features, self.train_features),
            "frechet_held_out": frechet_distance(self.train_features[self.same], self.held_out_features),
            **self._precision_recall(self.held_out_features),
            **self._closeness(self.distances),
            **_spread(self.all_features, self.all_pixels, self.all_labels),
        }

    def measure_sequences(self, sequences: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """`measure` of the last images of sequences `(S, N, H, W, 3)`, and how much the images of one sequence differ.

        Independent pictures are the last images of other sequences of the same class.
        """
        measured = self.measure(sequences[-1], labels)
        groups = [np.flatnonzero(labels == label) for label in np.unique(labels)]
        hands = self.hands(sequences[-1], labels)
        fours = [rows[start : start + 4] for rows in groups for start in range(0, len(rows) - 3, 4)]
        if fours:
            measured["hands"] = float(np.mean([len(set(hands[rows])) for rows in fours]))
        if len(sequences) > 1:
            features = np.stack([self.recogniser.judge(images)[0] for images in sequences])
            measured["sequence_diversity"] = float(np.mean([pdist(features[:, n]).mean() for n in range(len(labels))]))
            of_each = np.stack([self.hands(images, labels) for images in sequences])
            measured["sequence_hands"] = float(np.mean([len(set(of_each[:, n])) for n in range(len(labels))]))
        return measured

    def hands(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """For each picture the set whose training drawing of its class is nearest, `(N,)`."""
        rows, names = pixels(images), np.array(self.train.hands)
        found = np.empty(len(images), dtype=names.dtype)
        for label in np.unique(labels):
            own = self.train.labels == label
            distances = np.linalg.norm(rows[labels == label][:, None] - self.train_pixels[own], axis=-1)
            found[labels == label] = names[own][distances.argmin(1)]
        return found

    def share_of_hands(self, images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """How often each set is the hand of a picture."""
        counts = Counter(self.hands(images, labels).tolist())
        return {name: counts[name] / len(labels) for name in sorted(set(self.train.hands))}

    def reconstruction_distance(self, reconstructed: np.ndarray) -> float:
        """The distance that 95% of reconstructions `(M, H, W, 3)` in [0, 1] of the training drawings keep to them.

        They are of the drawings that `reconstructed_rows` names.
        """
        originals = self.train_pixels[reconstructed_rows(len(self.train_pixels), len(reconstructed))]
        return float(np.quantile(np.linalg.norm(pixels(reconstructed) - originals, axis=1), 0.95))

    def _precision_recall(self, features: np.ndarray) -> dict[str, float]:
        if len(features) <= NEIGHBOURS:
            return {}
        pair = precision_recall(torch.from_numpy(features), torch.from_numpy(self.train_features))
        return dict(zip(("precision", "recall"), pair, strict=True))

    def _closeness(self, distances: np.ndarray) -> dict[str, float]:
        """Of distances to the nearest training drawing."""
        return {
            "nearest": float(distances.mean()),
            "copies": float((distances < np.quantile(self.distances, COPY_QUANTILE)).mean()),
            "closer_than_half": float((distances < np.median(self.distances)).mean()),
        }


def reconstructed_rows(count: int, wanted: int) -> np.ndarray:
    """Indices of `wanted` of `count` drawings, evenly spread."""
    return np.linspace(0, count - 1, wanted).round().astype(int)


def _right(scores: np.ndarray, labels: np.ndarray, among: int = 1) -> np.ndarray:
    """Whether the labels `(N,)` are among the highest of the scores `(N, classes)`."""
    own = scores[np.arange(len(labels)), labels]
    return (scores > own[:, None]).sum(axis=1) < among


def _spread(features: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How much the pictures of a class differ; nothing where no class has two."""
    labels_of_several = np.flatnonzero(np.bincount(labels) > 1)
    several = np.isin(labels, labels_of_several)
    if not several.any():
        return {}
    pairs = [pdist(features[labels == label]).mean() for label in labels_of_several]
    return {
        "feature_variance": within_class_variance(features[several], labels[several]),
        "pixel_variance": within_class_variance(rows[several], labels[several]),
        "diversity": float(np.mean(pairs)),
    }
