"""What the commands share that judge a model against real images: generating, measures of features, seeds, tables.

Shapes: N images, D features.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.spatial.distance import cdist
from tqdm import tqdm

from training.evaluation import metrics
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path, new_file
from transdiff_pipelines.generation import DTYPES, SCHEDULER_CLASSES, make_scheduler, without_loading_bars


BATCH_SIZE = 250
RESAMPLES = 200


class Measure(NamedTuple):
    """How a measure is printed."""

    title: str
    unit: float
    """what it is multiplied by"""
    decimals: int


def nearest_neighbour_distance(features: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Euclidean distance `(N,)` of each row of features `(N, D)` to its nearest row of `reference` `(M, D)`."""
    return cdist(features, reference).min(axis=1)


def within_class_variance(features: np.ndarray, labels: np.ndarray) -> float:
    """Total variance of the features `(N, D)` of a class, averaged over the classes present."""
    return float(np.mean([features[labels == label].var(axis=0, ddof=1).sum() for label in np.unique(labels)]))


def frechet_distance(features: np.ndarray, reference: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to `(N, D)` and `(M, D)` features (the formula of the FID)."""
    return metrics.frechet_distance(_statistics(features), _statistics(reference))


def frechet_error(features: np.ndarray, reference: np.ndarray) -> float:
    """Standard error of the Fréchet distance of `(N, D)` to `(M, D)` features, from resamples of the former.

    The chance in the N images drawn is in it; that of the training run and of the real images is not.
    """
    random = np.random.default_rng(0)
    draws = [features[random.integers(len(features), size=len(features))] for _ in range(RESAMPLES)]
    return float(np.std([frechet_distance(draw, reference) for draw in draws], ddof=1))


def _statistics(features: np.ndarray) -> metrics.Statistics:
    return metrics.Statistics(features.mean(axis=0), np.cov(features, rowvar=False), len(features))


def generate(pipeline: TransDiffPipeline, labels: np.ndarray, seed: int, **settings: Any) -> np.ndarray:
    """Images `(N, H, W, 3)` in [0, 1], one for each label; what `settings` leave out has the pipeline's default."""
    return np.concatenate([output.images for output in _outputs(pipeline, labels, seed, settings)])


def generate_sequences(pipeline: TransDiffPipeline, labels: np.ndarray, seed: int, **settings: Any) -> np.ndarray:
    """All images of each sequence, `(S, N, H, W, 3)` in [0, 1]; the last are those of `generate`."""
    outputs = _outputs(pipeline, labels, seed, settings | {"return_intermediates": True})
    return np.concatenate([np.stack(output.intermediates) for output in outputs], axis=1)


def _outputs(pipeline: TransDiffPipeline, labels: np.ndarray, seed: int, settings: dict[str, Any]) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    outputs = []
    with tqdm(total=len(labels), desc=f"seed {seed}", unit="image") as progress:
        for batch in np.array_split(labels, range(BATCH_SIZE, len(labels), BATCH_SIZE)):
            outputs.append(pipeline(class_labels=batch.tolist(), generator=generator, output_type="np", **settings))
            progress.update(len(batch))
    return outputs


def summarise(runs: Sequence[dict[str, float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation over runs, measure by measure (a single run has spread 0)."""
    values = {name: [run[name] for run in runs] for name in runs[0]}
    mean = {name: float(np.mean(value)) for name, value in values.items()}
    spread = {name: float(np.std(value, ddof=1)) if len(runs) > 1 else 0.0 for name, value in values.items()}
    return mean, spread


def markdown_table(result: dict[str, Any], measures: Mapping[str, Measure]) -> str:
    """The result as a Markdown table: real split, generated images with their spread over seeds, and the ratio.

    A measure that the real images have no value of has a dash there; one that the result lacks is left out.
    """
    real, mean, spread = result["real"], result["mean"], result["spread"]
    lines = [f"| measure | real ({result['split']}) | generated | generated / real |", "|---|---|---|---|"]
    for name, (title, unit, digits) in measures.items():
        if name not in mean:
            continue
        ratio = f"{mean[name] / real[name]:.3f}" if real.get(name) else "-"
        shown = f"{real[name] * unit:.{digits}f}" if name in real else "-"
        lines.append(
            f"| {title} | {shown} | {mean[name] * unit:.{digits}f} ± {spread[name] * unit:.{digits}f} | {ratio} |"
        )
    return "\n".join(lines)


def add_options(parser: argparse.ArgumentParser, splits: Sequence[str], grid: str) -> None:
    """The options that every quality command has; `grid` says what `--grid` draws."""
    parser.add_argument("--split", choices=splits, default="validation", help="real images to compare with")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--guidance-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--num-inference-steps", type=int, help="default: the checkpoint's own")
    parser.add_argument("--scheduler", choices=SCHEDULER_CLASSES, help="default: the checkpoint's own")
    parser.add_argument("--drift-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--diffusion-scale", type=float, help="default: the checkpoint's own")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number format of the weights")
    parser.add_argument("--output", type=home_path, help="JSON file to write")
    parser.add_argument("--grid", type=home_path, help=f"PNG file to write: {grid}")


def load_pipeline(options: argparse.Namespace) -> TransDiffPipeline:
    """The saved pipeline, on the accelerator if there is one, with the scheduler and the scales that the options name.

    Raises:
        ValueError: the scheduler has no such scales.
    """
    with without_loading_bars():
        pipeline = TransDiffPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    scales = {"drift_scale": options.drift_scale, "diffusion_scale": options.diffusion_scale}
    pipeline.scheduler = make_scheduler(pipeline.scheduler, options.scheduler, **scales)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(best_device())


def measure_seeds(
    pipeline: TransDiffPipeline,
    options: argparse.Namespace,
    labels: np.ndarray,
    measure: Callable[[np.ndarray], dict[str, float]],
    make: Callable[..., np.ndarray] = generate,
) -> tuple[dict[str, Any], np.ndarray]:
    """Generate with each of `options.seeds` and measure: a part of the result, and the first seed's images.

    Args:
        labels: of the images, `(N,)`.
        measure: what `make` returns, to values by name.
        make: `generate` or `generate_sequences`.
    """
    chosen = {"guidance_scale": options.guidance_scale, "num_inference_steps": options.num_inference_steps}
    settings = {name: value for name, value in chosen.items() if value is not None}
    scales = {name: pipeline.scheduler.config.get(name) for name in ("drift_scale", "diffusion_scale")}
    runs: list[dict[str, float]] = []
    first: list[np.ndarray] = []
    seconds = 0.0
    for seed in options.seeds:
        started = time.perf_counter()
        images = make(pipeline, labels, seed, **settings)
        seconds += time.perf_counter() - started
        first = first or [images]  # those of the other seeds are not kept: a thousand classes fill the memory
        runs.append(measure(images))
    mean, spread = summarise(runs)
    result = {
        "settings": {
            "scheduler": type(pipeline.scheduler).__name__,
            "num_inference_steps": pipeline.recommended_num_inference_steps,
            "guidance_scale": pipeline.config.guidance_scale,
            "dtype": options.dtype,
            **scales,
            **settings,
        },
        "num_images": len(labels),
        "seconds_per_image": seconds / (len(labels) * len(options.seeds)),
        "mean": mean,
        "spread": spread,
        "runs": [{"seed": seed, **run} for seed, run in zip(options.seeds, runs, strict=True)],
    }
    return result, first[0]


def write_json(result: dict[str, Any], path: Path) -> None:
    """Write the result, whole or not at all."""
    with new_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
