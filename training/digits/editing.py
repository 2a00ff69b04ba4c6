"""Editing real digits with a digits model: class swaps at rising strength, and restoration of masked digits.

    python -m training.digits.editing --model FOLDER --data data/digits --split test --pictures DIR

Swap: every 3 of the split is turned into an 8 by `TransDiffImg2ImgPipeline`. Restoration: of every digit of the split
a band of a third of its rows, at a random height, is blackened and given back to `TransDiffInpaintPipeline`. Both are
measured with the recogniser of `training.digits.quality`, a support vector machine fit on real digits.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.data.splits import SPLITS
from training.digits.quality import Reference, load_split, pooled_pixels, recognition
from training.evaluation.quality import summarise
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffInpaintPipeline, TransDiffPipeline
from transdiff_pipelines.files import check_folder_writable, check_writable, home_path, new_file
from transdiff_pipelines.generation import without_loading_bars


SOURCE, TARGET = 3, 8
STRENGTHS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RESAMPLING = {"straight through": {"jump_n_sample": 1}, "resampled": {"jump_length": 5, "jump_n_sample": 4}}
BAND = 11  # rows of the image's 32: a third


def swap_classes(
    pipeline: TransDiffPipeline, images: np.ndarray, strengths: Sequence[float], seed: int, **settings: Any
) -> np.ndarray:
    """Images `(N, 32, 32, 3)` in [0, 1] turned into the target class at every strength: `(strengths, N, 32, 32, 3)`.

    Every strength starts from the same noise.
    """
    pipe = TransDiffImg2ImgPipeline.from_pipe(pipeline)
    pipe.set_progress_bar_config(disable=True)
    results = [
        pipe(
            images,
            TARGET,
            strength=strength,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **settings,
        ).images
        for strength in strengths
    ]
    return np.stack(results)


def measure_swaps(reference: Reference, originals: np.ndarray, swapped: np.ndarray) -> list[dict[str, float]]:
    """For every strength: share recognised as source and as target, and pixel distance (of 0..16) to the originals."""
    pixels = pooled_pixels(originals)
    rows = []
    for images in swapped:
        edited = pooled_pixels(images)
        labels = reference.recogniser.predict(edited)
        rows.append(
            {
                "source": float((labels == SOURCE).mean()),
                "target": float((labels == TARGET).mean()),
                "distance": float(np.sqrt(np.square(edited - pixels).mean())),
            }
        )
    return rows


def band_masks(count: int, seed: int) -> np.ndarray:
    """Masks `(count, 32, 32)`, 1 in a band of rows at a random height and 0 elsewhere."""
    masks = np.zeros((count, 32, 32), dtype=np.float32)
    for mask, top in zip(masks, np.random.default_rng(seed).integers(0, 32 - BAND + 1, count), strict=True):
        mask[top : top + BAND] = 1
    return masks


@torch.no_grad()
def restore(
    pipeline: TransDiffPipeline, images: np.ndarray, masks: np.ndarray, labels: np.ndarray, seed: int, **settings: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Restore masked images `(N, 32, 32, 3)` in [0, 1]: the results, and what they were before compositing."""
    pipe = TransDiffInpaintPipeline.from_pipe(pipeline)
    pipe.set_progress_bar_config(disable=True)
    last: dict[str, torch.Tensor] = {}
    result = pipe(
        images,
        masks,
        labels.tolist(),
        generator=torch.Generator().manual_seed(seed),
        output_type="np",
        callback_on_step_end=lambda pipe, step, timestep, tensors: last.update(tensors),
        **settings,
    )
    return result.images, pipe.decode_latents(last["latents"], "np")


def measure_restoration(
    reference: Reference, originals: np.ndarray, masks: np.ndarray, labels: np.ndarray, images: np.ndarray
) -> dict[str, float]:
    """Measures of restored images `(N, 32, 32, 3)` in [0, 1].

    Recognition is the share recognised as what they were; errors are those of pixels; the seam is the mean difference
    between neighbours of which one was known and one was not.
    """
    errors = images - originals
    seams = masks[:, 1:] != masks[:, :-1]
    return {
        "recognition": recognition(reference.recogniser, pooled_pixels(images), labels),
        "known_error_max": float(np.abs(errors[masks == 0]).max()),
        "known_error_rms": float(np.sqrt(np.square(errors[masks == 0]).mean())),
        "unknown_error_rms": float(np.sqrt(np.square(errors[masks == 1]).mean())),
        "seam": float(np.abs(images[:, 1:] - images[:, :-1])[seams].mean()),
    }


def evaluate_swaps(pipeline: TransDiffPipeline, reference: Reference, options: argparse.Namespace) -> tuple:
    """Swap measures, averaged over seeds, for every strength; and the pictures of the first seed."""
    images, labels = load_split(options.data, options.split)
    originals = images[labels == SOURCE]
    settings = {"num_inference_steps": options.num_inference_steps, "references": options.references}
    runs, pictures = [], None
    for seed in options.seeds:
        swapped = swap_classes(pipeline, originals, STRENGTHS, seed, **settings)
        runs.append(measure_swaps(reference, originals, swapped))
        pictures = np.concatenate([originals[None], swapped]) if pictures is None else pictures
    rows = []
    for strength, measured in zip(STRENGTHS, zip(*runs, strict=True), strict=True):
        mean, spread = summarise(measured)
        rows.append({"strength": strength, "mean": mean, "spread": spread})
    return rows, pictures


def evaluate_restoration(pipeline: TransDiffPipeline, reference: Reference, options: argparse.Namespace) -> tuple:
    """Restoration measures, averaged over seeds, with and without resampling; and the pictures of the first seed."""
    originals, labels = load_split(options.data, options.split)
    settings = {"num_inference_steps": options.num_inference_steps, "references": options.references}
    runs: dict[str, list[dict[str, float]]] = {}
    pictures: list[np.ndarray] = []
    for seed in options.seeds:
        masks = band_masks(len(originals), seed)
        masked = originals * (1 - masks[..., None])
        results = {"original": originals, "masked": masked}
        for name, jumps in RESAMPLING.items():
            results[name], raw = restore(pipeline, masked, masks, labels, seed, **settings, **jumps)
            results[f"{name}, not composited"] = raw
        for name, images in results.items():
            measured = measure_restoration(reference, originals, masks, labels, images)
            runs.setdefault(name, []).append(measured)
        if not pictures:
            shown = results | {"masked": masked + 0.5 * masks[..., None]}
            pictures = [shown[name] for name in ("original", "masked", *RESAMPLING)]
    rows = []
    for name, measures in runs.items():
        mean, spread = summarise(measures)
        rows.append({"images": name, "mean": mean, "spread": spread})
    return rows, np.stack(pictures)


def save_pictures(pictures: np.ndarray, path: Path, scale: int = 2) -> None:
    """Save `(rows, columns, 32, 32, 3)` in [0, 1] as one enlarged PNG, with a white pixel between neighbours."""
    pictures = np.pad(pictures, [(0, 0), (0, 0), (0, 1), (0, 1), (0, 0)], constant_values=1)
    image = np.concatenate([np.concatenate(list(row), axis=1) for row in pictures], axis=0)
    image = np.round(image.repeat(scale, axis=0).repeat(scale, axis=1) * 255).astype(np.uint8)
    with new_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="png")


def markdown(result: dict) -> str:
    """Both results as Markdown tables."""
    lines = [
        f"| strength | recognised as {TARGET}, % | as {SOURCE}, % | distance to the original |",
        "|---|---|---|---|",
    ]
    for row in result["swap"]:
        mean, spread = row["mean"], row["spread"]
        lines.append(
            f"| {row['strength']:.1f} | {100 * mean['target']:.1f} ± {100 * spread['target']:.1f} "
            f"| {100 * mean['source']:.1f} ± {100 * spread['source']:.1f} | {mean['distance']:.2f} |"
        )
    lines += ["", "| digits | recognised, % | error of known pixels, max | rms | of masked pixels, rms | seam |"]
    lines += ["|---|---|---|---|---|---|"]
    for row in result["restoration"]:
        mean, spread = row["mean"], row["spread"]
        lines.append(
            f"| {row['images']} | {100 * mean['recognition']:.1f} ± {100 * spread['recognition']:.1f} "
            f"| {mean['known_error_max']:.3f} | {mean['known_error_rms']:.3f} | {mean['unknown_error_rms']:.3f} "
            f"| {mean['seam']:.3f} |"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a saved TransDiffPipeline")
    parser.add_argument("--data", type=home_path, required=True, help="folder written by training.digits.export")
    parser.add_argument("--split", choices=SPLITS[1:], default="validation", help="real digits to edit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num-inference-steps", type=int, default=25)
    parser.add_argument("--references", default="generated", help="earlier images of the MRAR sequence")
    parser.add_argument("--output", type=home_path, help="JSON file to write")
    parser.add_argument("--pictures", type=home_path, help="folder for editing_swap.png and editing_restoration.png")
    return parser.parse_args(arguments)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    if options.output:
        check_writable(options.output)
    if options.pictures:
        check_folder_writable(options.pictures)
    with without_loading_bars():
        pipeline = TransDiffPipeline.from_pretrained(options.model)
    reference = Reference(options.data, options.split)
    swap, swap_pictures = evaluate_swaps(pipeline, reference, options)
    restoration, restoration_pictures = evaluate_restoration(pipeline, reference, options)
    settings = {name: getattr(options, name) for name in ("split", "seeds", "num_inference_steps", "references")}
    result = {"settings": settings, "swap": swap, "restoration": restoration}
    print(markdown(result))
    if options.output:
        with new_file(options.output) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        save_pictures(swap_pictures[:, :8].swapaxes(0, 1), options.pictures / "editing_swap.png")
        evenly = np.linspace(0, restoration_pictures.shape[1] - 1, 20).astype(int)
        save_pictures(restoration_pictures[:, evenly], options.pictures / "editing_restoration.png")


if __name__ == "__main__":
    main()
