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
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.svm import SVC

from training.data.splits import SPLITS
from training.digits.export import DATA_MAXIMUM, block_means
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import check_writable, home_path, new_file


NUM_CLASSES = 10
BATCH_SIZE = 250
MEASURES = {  # name in the result: title, unit it is printed in, decimals
    "recognition": ("recognised, %", 100, 2),
    "nearest": ("distance to the nearest training image", 1, 3),
    "copies": ("closer to one than 99% of the real split, %", 100, 2),
    "variance": ("variance within a class", 1, 1),
    "frechet": ("Fréchet distance of pixels to the real split (real: of the training split)", 1, 2),
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


def nearest_neighbour_distance(pixels: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Euclidean distance `(N,)` of each row of `pixels` `(N, 64)` to its nearest row of `reference` `(M, 64)`."""
    return cdist(pixels, reference).min(axis=1)


def within_class_variance(pixels: np.ndarray, labels: np.ndarray) -> float:
    """Total variance of the pixels `(N, 64)` of a class, averaged over the classes present."""
    return float(np.mean([pixels[labels == label].var(axis=0, ddof=1).sum() for label in np.unique(labels)]))


def frechet_distance(pixels: np.ndarray, reference: np.ndarray) -> float:
    """Squared Frechet distance between Gaussians fitted to `(N, D)` and `(M, D)` features (the formula of the FID).

    `|mean - mean'|^2 + tr(S + S' - 2 (S S')^(1/2))`. The eigenvalues of `S S'` are those of the symmetric
    `R S' R`, where `R` is the square root of `S`; so no general matrix root is needed.
    """
    covariance, reference_covariance = np.cov(pixels, rowvar=False), np.cov(reference, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    eigenvalues = np.linalg.eigvalsh(root @ reference_covariance @ root).clip(min=0)
    shift = np.square(pixels.mean(axis=0) - reference.mean(axis=0)).sum()
    return float(shift + np.trace(covariance) + np.trace(reference_covariance) - 2 * np.sqrt(eigenvalues).sum())


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


def generate(pipeline: TransDiffPipeline, labels: np.ndarray, seed: int, **settings: Any) -> np.ndarray:
    """Images `(N, 32, 32, 3)` in [0, 1], one for each label; what `settings` leave out has the pipeline's default."""
    generator = torch.Generator().manual_seed(seed)
    batches = [
        pipeline(class_labels=batch.tolist(), generator=generator, output_type="np", **settings).images
        for batch in np.array_split(labels, range(BATCH_SIZE, len(labels), BATCH_SIZE))
    ]
    return np.concatenate(batches)


def save_grid(images: np.ndarray, path: str | os.PathLike, rows: int = 10) -> None:
    """Save the first `rows * 10` images, a column for each digit."""
    images = images[: rows * NUM_CLASSES]
    side = images.shape[1]
    grid = images.reshape(-1, NUM_CLASSES, side, side, 3).transpose(0, 2, 1, 3, 4).reshape(-1, NUM_CLASSES * side, 3)
    with new_file(path) as temporary:
        Image.fromarray(np.round(grid * 255).astype(np.uint8)).save(temporary, format="png")


def summarise(runs: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation over runs, measure by measure (a single run has spread 0)."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    mean = {name: float(np.mean(value)) for name, value in values.items()}
    spread = {name: float(np.std(value, ddof=1)) if len(runs) > 1 else 0.0 for name, value in values.items()}
    return mean, spread


def markdown_table(result: dict) -> str:
    """The result as a Markdown table: real split, generated images with their spread over seeds, and the ratio."""
    real, mean, spread = result["real"], result["mean"], result["spread"]
    lines = [f"| measure | real ({result['split']}) | generated | generated / real |", "|---|---|---|---|"]
    for name, (title, unit, digits) in MEASURES.items():
        ratio = f"{mean[name] / real[name]:.3f}" if real[name] else "-"
        lines.append(
            f"| {title} | {real[name] * unit:.{digits}f} "
            f"| {mean[name] * unit:.{digits}f} ± {spread[name] * unit:.{digits}f} | {ratio} |"
        )
    return "\n".join(lines)


def evaluate(pipeline: TransDiffPipeline, options: argparse.Namespace) -> tuple[dict, np.ndarray]:
    """Generate and measure once for each seed: the result that is written as JSON, and the first seed's images."""
    reference = Reference(options.data, options.split)
    labels = balanced_labels(options.num_images)
    chosen = {"guidance_scale": options.guidance_scale, "num_inference_steps": options.num_inference_steps}
    settings = {name: value for name, value in chosen.items() if value is not None}
    scales = {name: pipeline.scheduler.config[name] for name in ("drift_scale", "diffusion_scale")}
    started = time.perf_counter()
    generated = [generate(pipeline, labels, seed, **settings) for seed in options.seeds]
    seconds = time.perf_counter() - started
    runs = [reference.measure(pooled_pixels(images), labels) for images in generated]
    mean, spread = summarise(runs)
    result = {
        "model": str(options.model),
        "split": options.split,
        "recogniser_fit_on": list(reference.fit_on),
        "settings": {"guidance_scale": pipeline.config.guidance_scale, **scales, **settings},
        "num_images": options.num_images,
        "seconds_per_image": seconds / (options.num_images * len(options.seeds)),
        "real": reference.measure_real(),
        "mean": mean,
        "spread": spread,
        "runs": [{"seed": seed, **run} for seed, run in zip(options.seeds, runs, strict=True)],
    }
    return result, generated[0]


def load_pipeline(options: argparse.Namespace) -> TransDiffPipeline:
    """The saved pipeline, on a GPU if there is one; scales that the options name replace the scheduler's."""
    pipeline = TransDiffPipeline.from_pretrained(options.model)
    chosen = {"drift_scale": options.drift_scale, "diffusion_scale": options.diffusion_scale}
    scales = {name: value for name, value in chosen.items() if value is not None}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **scales)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved TransDiffPipeline")
    parser.add_argument("--data", type=home_path, required=True, help="folder written by training.digits.export")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation", help="real images to compare with")
    parser.add_argument("--num-images", type=int, default=1000, help="images per seed, a multiple of ten")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--num-inference-steps", type=int, help="default: the pipeline's")
    parser.add_argument("--drift-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--diffusion-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--output", type=home_path, help="JSON file to write")
    parser.add_argument("--grid", type=home_path, help="PNG file to write: ten images of each digit")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    for path in filter(None, (options.output, options.grid)):
        check_writable(path)
    result, images = evaluate(load_pipeline(options), options)
    print(markdown_table(result))
    if options.output:
        with new_file(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    if options.grid:
        save_grid(images, options.grid)


if __name__ == "__main__":
    main()
