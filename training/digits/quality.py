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
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.svm import SVC

from training.data.splits import SPLITS
from training.digits.export import DATA_MAXIMUM, block_means
from training.evaluation.quality import (
    Measure,
    add_options,
    frechet_distance,
    load_pipeline,
    markdown_table,
    measure_seeds,
    nearest_neighbour_distance,
    within_class_variance,
    write_json,
)
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import check_writable, home_path, new_file


NUM_CLASSES = 10
MEASURES = {
    "recognition": Measure("recognised, %", 100, 2),
    "nearest": Measure("distance to the nearest training image", 1, 3),
    "copies": Measure("closer to one than 99% of the real split, %", 100, 2),
    "variance": Measure("variance within a class", 1, 1),
    "frechet": Measure("Fréchet distance of pixels to the real split (real: of the training split)", 1, 2),
}


def load_split(data: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read `data/split/LABEL/*.png` into images `(N, 32, 32, 3)` in [0, 1] and labels `(N,)`.

    Raises:
        FileNotFoundError: there are no such images.
    """
    paths = sorted(Path(data, split).glob("[0-9]/*.png"))
    if not paths:
        raise FileNotFoundError(
            f"no digits under {Path(data, split)}; write them with `python -m training.digits.export --output "
            f"{shlex.quote(str(data))}`"
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


class Reference:
    """The real digits that generated ones are compared with.

    Args:
        data: folder written by `training.digits.export`.
        split: `"validation"` or `"test"`. The recogniser is fit on `train`, and for `"test"` on `train` and
            `validation`; distances to training images are always to `train`, which is what the model saw.
    """

    def __init__(self, data: str | os.PathLike, split: str) -> None:
        self.train, train_labels = load_pixels(data, "train")
        self.pixels, self.labels = load_pixels(data, split)
        self.fit_on = SPLITS[: SPLITS.index(split)]
        parts = [load_pixels(data, name) for name in self.fit_on]
        self.recogniser = fit_recogniser(*(np.concatenate(part) for part in zip(*parts, strict=True)))
        self.copy_distance = np.quantile(nearest_neighbour_distance(self.pixels, self.train), 0.01)

    def measure(self, pixels: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """All measures of a set of pixels `(N, 64)` with the labels `(N,)` they should show."""
        distances = nearest_neighbour_distance(pixels, self.train)
        return {
            "recognition": recognition(self.recogniser, pixels, labels),
            "nearest": float(distances.mean()),
            "copies": float((distances < self.copy_distance).mean()),
            "variance": within_class_variance(pixels, labels),
            "frechet": frechet_distance(pixels, self.pixels),
        }

    def measure_real(self) -> dict[str, float]:
        """The same of the real split itself; its Frechet distance is that of the training split to it."""
        return self.measure(self.pixels, self.labels) | {"frechet": frechet_distance(self.train, self.pixels)}


def load_pixels(data: str | os.PathLike, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pooled pixels `(N, 64)` in 0..16 and labels `(N,)` of a split."""
    images, labels = load_split(data, split)
    return pooled_pixels(images), labels


def balanced_labels(count: int) -> np.ndarray:
    """Labels 0, 1, ... 9, 0, 1, ...: `(count,)`, an equal number of each.

    Raises:
        ValueError: `count` is not a positive multiple of ten.
    """
    if count <= 0 or count % NUM_CLASSES:
        raise ValueError(f"the number of images is {count}; expected a positive multiple of {NUM_CLASSES}")
    return np.arange(count) % NUM_CLASSES


def save_grid(images: np.ndarray, path: str | os.PathLike, rows: int = 10) -> None:
    """Save the first `rows * 10` images, a column for each digit."""
    images = images[: rows * NUM_CLASSES]
    side = images.shape[1]
    grid = images.reshape(-1, NUM_CLASSES, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, NUM_CLASSES * side, 3)
    with new_file(path) as temporary:
        Image.fromarray(np.round(grid * 255).astype(np.uint8)).save(temporary, format="png")


def evaluate(pipeline: TransDiffPipeline, options: argparse.Namespace) -> tuple[dict[str, Any], np.ndarray]:
    """Generate and measure once for each seed: the result that is written as JSON, and the first seed's images."""
    reference = Reference(options.data, options.split)
    labels = balanced_labels(options.num_images)
    result, images = measure_seeds(
        pipeline, options, labels, lambda images: reference.measure(pooled_pixels(images), labels)
    )
    facts = {"model": str(options.model), "split": options.split, "recogniser_fit_on": list(reference.fit_on)}
    return {**facts, "real": reference.measure_real(), **result}, images


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved TransDiffPipeline")
    parser.add_argument("--data", type=home_path, required=True, help="folder written by training.digits.export")
    parser.add_argument("--num-images", type=int, default=1000, help="images per seed, a multiple of ten")
    add_options(parser, SPLITS[1:], "ten images of each digit")
    return parser.parse_args(arguments)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    for path in filter(None, (options.output, options.grid)):
        check_writable(path)
    result, images = evaluate(load_pipeline(options), options)
    print(markdown_table(result, MEASURES))
    if options.output:
        write_json(result, options.output)
    if options.grid:
        save_grid(images, options.grid)


if __name__ == "__main__":
    main()
