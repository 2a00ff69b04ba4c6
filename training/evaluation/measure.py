"""Metrics of generated images, as far as extractor and reference allow; the rest is named with a reason."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from training.evaluation.features import Extractor
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
    with tqdm(total=count, desc="features", unit="image") as progress:
        for images in batches:
            extracted = extractor(images)
            pool.add(extracted.pool)
            if keep_features:
                features.append(extracted.pool.float().cpu())
            if extracted.spatial is not None:
                spatial.add(extracted.spatial)
            if extracted.logits is not None and count >= IS_SPLITS:
                score = score or InceptionScore(count, IS_SPLITS)
                score.add(extracted.logits)
            progress.update(len(images))
    generated = Reference(pool.result(), spatial.result() if spatial.count else None)
    generated.features = torch.cat(features) if features else None
    metrics, missing = _compare(generated, reference)
    if score is not None:
        metrics["inception_score"], metrics["inception_score_std"] = score.result()
    elif count < IS_SPLITS:
        missing["inception_score"] = f"{count} images are fewer than its {IS_SPLITS} splits"
    else:
        missing["inception_score"] = "the extractor has no class probabilities"
    return {"metrics": metrics, "not_computed": missing, "notes": _notes(generated, reference)}


def _compare(generated: Reference, reference: Reference | None) -> tuple[dict[str, float], dict[str, str]]:
    if reference is None:
        return {}, dict.fromkeys(("fid", "sfid", "precision", "recall"), "no reference was given")
    metrics = {"fid": frechet_distance(generated.statistics, reference.statistics)}
    missing = {}
    if generated.spatial is None:
        missing["sfid"] = "the extractor has no spatial features"
    elif reference.spatial is None:
        missing["sfid"] = "the reference has no spatial statistics (mu_s, sigma_s)"
    else:
        metrics["sfid"] = frechet_distance(generated.spatial, reference.spatial)
    if reference.features is None or generated.features is None:
        reason = "the reference holds statistics alone; they need its images (an ADM reference batch, or a folder)"
    elif min(len(reference.features), len(generated.features)) <= NEIGHBOURS:
        reason = f"they need more than {NEIGHBOURS} images on each side"
    else:
        metrics["precision"], metrics["recall"] = precision_recall(generated.features, reference.features)
        return metrics, missing
    return metrics, missing | dict.fromkeys(("precision", "recall"), reason)


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
