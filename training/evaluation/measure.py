"""Metrics of generated images, as far as extractor and reference allow; the rest is named with a reason."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.evaluation.features import Extractor, Features
from training.evaluation.metrics import (
    NEIGHBOURS,
    InceptionScore,
    RunningStatistics,
    frechet_distance,
    precision_recall,
)
from training.evaluation.references import Reference
from training.evaluation.sampling import read_images


TITLES = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "precision": "Precision", "recall": "Recall"}
IS_SPLITS = 10


def measure(paths: list[Path], extractor: Extractor, reference: Reference | None) -> dict[str, Any]:
    """`measure_batches` of picture files."""
    return measure_batches(read_images(paths), len(paths), extractor, reference)


def measure_batches(
    batches: Iterator[torch.Tensor], count: int, extractor: Extractor, reference: Reference | None
) -> dict[str, Any]:
    """FID, sFID, Inception Score, precision and recall of `count` images, in batches `(B, 3, H, W)` uint8.

    Returns:
        `metrics`, name to value; `not_computed`, name to reason; `notes`, what limits the values.
    """
    pool, spatial, features, score = RunningStatistics(), RunningStatistics(), [], None
    keep_features = reference is not None and reference.features is not None
    missing: dict[str, str] = {}
    with tqdm(total=count, desc="features", unit="image") as progress:
        for images in batches:
            extracted = extractor(images)
            missing = not_computed(extracted, reference, count)
            pool.add(extracted.pool)
            if keep_features:
                features.append(extracted.pool.float().cpu())
            if extracted.spatial is not None:
                spatial.add(extracted.spatial)
            if extracted.logits is not None and "inception_score" not in missing:
                score = score or InceptionScore(count, IS_SPLITS)
                score.add(extracted.logits)
            progress.update(len(images))
    generated = Reference(pool.result(), spatial.result() if spatial.count else None)
    generated.features = torch.cat(features) if features else None
    metrics = _compare(generated, reference, missing) if reference is not None else {}
    if score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = score.result()
    return {"metrics": metrics, "not_computed": missing, "notes": _notes(generated, reference)}


def not_computed(features: Features, reference: Reference | None, count: int) -> dict[str, str]:
    """The metrics that cannot be computed of `count` images with such features, each with the reason."""
    missing: dict[str, str] = {}
    if reference is None:
        missing = dict.fromkeys(("fid", "sfid", "precision", "recall"), "no reference was given")
    else:
        if features.spatial is None:
            missing["sfid"] = "the extractor has no spatial features"
        elif reference.spatial is None:
            missing["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
        reason = None
        if reference.features is None:
            reason = "the reference holds statistics alone; they need its images (an ADM reference batch, or a folder)"
        elif min(len(reference.features), count) <= NEIGHBOURS:
            reason = f"they need more than {NEIGHBOURS} images on each side"
        missing |= {} if reason is None else dict.fromkeys(("precision", "recall"), reason)
    if count < IS_SPLITS:
        missing["inception_score"] = f"{count} images are fewer than its {IS_SPLITS} splits"
    elif features.logits is None:
        missing["inception_score"] = "the extractor has no class probabilities"
    return missing


def _compare(generated: Reference, reference: Reference, missing: Mapping[str, str]) -> dict[str, float]:
    metrics = {"fid": frechet_distance(generated.statistics, reference.statistics)}
    if generated.spatial is not None and reference.spatial is not None:
        metrics["sfid"] = frechet_distance(generated.spatial, reference.spatial)
    own, real = generated.features, reference.features
    if "precision" not in missing and own is not None and real is not None:
        metrics["precision"], metrics["recall"] = precision_recall(own, real)
    return metrics


def _notes(generated: Reference, reference: Reference | None) -> list[str]:
    notes = []
    sides = [("generated", generated.statistics)] + ([("real", reference.statistics)] if reference else [])
    for name, statistics in sides:
        width = len(statistics.mean)
        if statistics.count is not None and statistics.count <= width:
            notes.append(
                f"the covariance of {statistics.count} {name} images is not of full rank in {width} features: the "
                "Fréchet distance is biased upwards and not comparable with that of more images"
            )
    return notes
