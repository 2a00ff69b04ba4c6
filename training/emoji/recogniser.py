"""A small convolutional network that names emoji: what judges a model of them, and whose features compare pictures.

It is trained on the drawings of the training split alone, with pictures moved, resized, turned and recoloured a
little, and not mirrored, because letters, clocks and signs are other things in a mirror. With five drawings of a class
it learns what the hands have in common; a drawing by an unseen hand is what it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from tqdm import trange

from training.data.errors import DataError
from transdiff_pipelines.files import new_file


NUM_FEATURES = 64
WIDTH = 24
EPOCHS = 60
FEWEST_STEPS = 600  # of a few classes, whose epochs are short
BATCH_SIZE = 128
SMALLEST_BATCH = 2  # batch normalisation needs a spread
LEARNING_RATE = 6e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
SHARPNESS = 16.0
"""Cosines times this are the logits."""

SHIFT, RESIZE, TURN, RECOLOUR = 0.06, 0.15, 0.15, 0.2
"""Most that pictures are moved (share of the side), resized and recoloured (shares), turned (radians) in training."""


class Recogniser(nn.Module):
    """Pictures to scores of classes, by the cosine between features and a direction for each class.

    Args:
        classes: their names.
        width: channels of the first of four layers.

    Attributes:
        trained_on: digest of the drawings; empty before.
    """

    def __init__(self, classes: Sequence[str], width: int = WIDTH) -> None:
        super().__init__()
        self.classes = list(classes)
        self.width = width
        self.trained_on = ""
        layers: list[nn.Module] = []
        channels = [3, width, 2 * width, 4 * width, 8 * width]
        for before, after in zip(channels, channels[1:], strict=False):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        # Quarters of the picture are pooled by themselves, because where a part is says much about a drawing.
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32 * width, NUM_FEATURES))
        self.norm = nn.BatchNorm1d(NUM_FEATURES, affine=False)
        self.directions = nn.Parameter(torch.randn(len(classes), NUM_FEATURES))

    def features(self, pictures: torch.Tensor) -> torch.Tensor:
        """Features `(N, 64)` of pictures `(N, 3, H, W)` in [0, 1]; over the training set of about unit variance."""
        return self.norm(self.body(1 - pictures))

    def scores(self, features: torch.Tensor) -> torch.Tensor:
        """Logits `(N, classes)` of features."""
        cosines = functional.normalize(features, dim=1) @ functional.normalize(self.directions, dim=1).T
        return SHARPNESS * cosines

    @torch.no_grad()
    def judge(self, images: np.ndarray, batch_size: int = 500) -> tuple[np.ndarray, np.ndarray]:
        """Features `(N, 64)` and logits `(N, classes)`, in float64, of images `(N, H, W, 3)`, uint8 or in [0, 1]."""
        self.eval()
        device = self.directions.device
        found = []
        for start in range(0, len(images), batch_size):
            features = self.features(to_pictures(images[start : start + batch_size]).to(device))
            found.append((features.cpu(), self.scores(features).cpu()))
        all_features, all_scores = (torch.cat(part).double().numpy() for part in zip(*found, strict=True))
        return all_features, all_scores

    def fit(self, images: np.ndarray, labels: np.ndarray, epochs: int | None = None, seed: int = 0) -> None:
        """Train on images `(N, H, W, 3)`, uint8, with labels `(N,)`; EPOCHS times, or until FEWEST_STEPS are made."""
        device = self.directions.device
        random = torch.Generator().manual_seed(seed)
        pictures, targets = to_pictures(images), torch.from_numpy(labels)
        batches = -(-len(images) // BATCH_SIZE)
        epochs = epochs or max(EPOCHS, -(-FEWEST_STEPS // batches))
        optimizer = torch.optim.AdamW(self.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * batches)
        self.train()
        for _ in trange(epochs, desc="recogniser", unit="epoch"):
            for rows in torch.randperm(len(pictures), generator=random).split(BATCH_SIZE):
                if len(rows) >= SMALLEST_BATCH:
                    varied = varied_pictures(pictures[rows], random).to(device)
                    scores = self.scores(self.features(varied))
                    loss = functional.cross_entropy(scores, targets[rows].to(device), label_smoothing=LABEL_SMOOTHING)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                schedule.step()
        self.eval()

    def save(self, path: Path) -> None:
        """Write weights and names of classes."""
        metadata = {
            "classes": json.dumps(self.classes),
            "width": str(self.width),
            "trained_on": self.trained_on,
        }
        with new_file(path) as temporary:
            save_file({name: value.contiguous() for name, value in self.state_dict().items()}, temporary, metadata)


def load_recogniser(path: Path) -> Recogniser:
    """What `Recogniser.save` wrote.

    Raises:
        DataError: if it is something else.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            recogniser = Recogniser(json.loads(metadata["classes"]), int(metadata["width"]))
            recogniser.trained_on = metadata["trained_on"]
            recogniser.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{path} holds no recogniser of emoji ({error}); remove it, and a new one is trained"
        ) from None
    return recogniser.eval()


def new_recogniser(classes: Sequence[str], width: int = WIDTH, seed: int = 0) -> Recogniser:
    """An untrained one, the same for a seed; the random numbers of others are not touched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Recogniser(classes, width)


def to_pictures(images: np.ndarray) -> torch.Tensor:
    """`(N, H, W, 3)`, uint8 or in [0, 1], to `(N, 3, H, W)` in [0, 1] in float32."""
    scale = 255 if images.dtype == np.uint8 else 1
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / scale


def varied_pictures(pictures: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Pictures moved, resized, turned and recoloured at random, each in its own way."""

    def uniform(most: float, *shape: int) -> torch.Tensor:
        return most * (2 * torch.rand(len(pictures), *shape, generator=random) - 1)

    angle, size = uniform(TURN), 1 + uniform(RESIZE)
    cosine, sine = size * angle.cos(), size * angle.sin()
    shift = uniform(2 * SHIFT, 2)  # the grid's side is 2
    grid = torch.stack([torch.stack([cosine, -sine, shift[:, 0]], 1), torch.stack([sine, cosine, shift[:, 1]], 1)], 1)
    places = functional.affine_grid(grid, list(pictures.shape), align_corners=False)
    moved = functional.grid_sample(pictures, places, padding_mode="border", align_corners=False)
    return 1 - (1 - moved) * (1 + uniform(RECOLOUR, 3, 1, 1))  # white stays white
