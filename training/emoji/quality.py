"""Quality of generated emoji, measured against the real drawings.

    python -m training.emoji.quality --data datasets/emoji --recogniser outputs/emoji_recogniser.safetensors
    python -m training.emoji.quality --data datasets/emoji --recogniser outputs/emoji_recogniser.safetensors \
        --model outputs/emoji_mrar/pipeline --split test --output quality.json --grid quality.png

The first command trains the recogniser (minutes on two cores), where the file is not there yet, and tells its accuracy
on the held-out drawings: the ceiling of what a model can be asked for. The second one judges a model by it. Each class
is drawn `--per-class` times for each seed. The measures are those of `training.emoji.judge`.

Six drawings of a class are few, and much of what a model draws of them is memory. So three shares say how close the
pictures are to training drawings: closer than 99% of the held-out drawings are, closer than half of them, and as close
as the VAE's own reconstructions of training drawings, which nobody could tell from a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.command_line import one_line_errors, positive
from training.data.errors import DataError
from training.data.labels import listed
from training.data.splits import SPLITS
from training.evaluation.quality import (
    add_options,
    generate_sequences,
    load_pipeline,
    markdown_table,
    measure_seeds,
    nearest_neighbour_distance,
    write_json,
)
from training.experiments.common import picture
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import check_writable, home_path, new_file

from .judge import MEASURES, Drawings, Judge, pixels, reconstructed_rows
from .recogniser import load_recogniser, new_recogniser, to_pictures


RECONSTRUCTED = 512  # drawings whose reconstructions say how close a copy is
SHEET_ROWS, SHEET_COLUMNS = 12, 16


def recogniser_for(options: argparse.Namespace) -> Judge:
    """The judge, with the recogniser of the file, or one that is trained and written there."""
    if options.recogniser.exists():
        recogniser = load_recogniser(options.recogniser)
    else:
        check_writable(options.recogniser)
        train = Drawings(options.data, "train")
        recogniser = new_recogniser(train.classes).to(best_device())
        recogniser.fit(train.images, train.labels, options.epochs)
        recogniser.trained_on = train.digest
        recogniser.save(options.recogniser)
    return Judge(options.data, options.split, recogniser)


def chosen_labels(
    pipeline: TransDiffPipeline, classes: Sequence[str], count: int | None, per_class: int
) -> np.ndarray:
    """Labels of `count` classes, evenly spread over the list, each `per_class` times in a row.

    Raises:
        DataError: if the pipeline has other classes than the drawings.
    """
    names = {int(label): name for label, name in (pipeline.config.id2label or {}).items()}
    if [names.get(label) for label in range(len(classes))] != list(classes):
        other = sorted(set(names.values()) ^ set(classes))
        raise DataError(
            f"the model's classes are not those of the drawings, in their order: {listed(other) or 'the same names'}; "
            "name the data that it was trained on"
        )
    chosen = np.unique(np.linspace(0, len(classes) - 1, min(count or len(classes), len(classes))).round().astype(int))
    return np.repeat(chosen, per_class)


@torch.no_grad()
def reconstructions(pipeline: TransDiffPipeline, images: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """Images `(N, H, W, 3)`, uint8, through the pipeline's VAE and back, in [0, 1]."""
    made = []
    for start in range(0, len(images), batch_size):
        latents = pipeline.encode_image(to_pictures(images[start : start + batch_size]))
        made.append(pipeline.decode_latents(latents, "np"))
    return np.concatenate(made)


def evaluate(
    pipeline: TransDiffPipeline, judge: Judge, options: argparse.Namespace
) -> tuple[dict[str, Any], Image.Image]:
    """Generate and measure once for each seed: the result that is written as JSON, and a sheet of the first seed."""
    train = judge.train
    side = train.images.shape[1]
    if pipeline.image_side != side:
        raise DataError(
            f"the model draws {pipeline.image_side} pixels a side and the drawings have {side}; render them with "
            f"--size {pipeline.image_side}"
        )
    labels = chosen_labels(pipeline, train.classes, options.num_classes, options.per_class)
    rows = reconstructed_rows(len(train.images), min(RECONSTRUCTED, len(train.images)))
    copied = judge.reconstruction_distance(reconstructions(pipeline, train.images[rows]))

    def measure(sequences: np.ndarray) -> dict[str, float]:
        distances = nearest_neighbour_distance(pixels(sequences[-1]), judge.train_pixels)
        return judge.measure_sequences(sequences, labels) | {"reconstructions": float((distances <= copied).mean())}

    result, sequences = measure_seeds(pipeline, options, labels, measure, generate_sequences)
    facts = {
        "model": str(options.model),
        "split": options.split,
        "num_classes": len(np.unique(labels)),
        "images_in_sequence": len(sequences),
        "accuracy_of_recogniser": judge.accuracy,
        "distance_of_reconstructions": copied,
        "share_of_hands": judge.share_of_hands(sequences[-1], labels),
    }
    real = judge.measure_real() | {"reconstructions": float((judge.distances <= copied).mean())}
    return {**facts, "real": real, **result}, sheet(sequences[-1], labels)


def sheet(images: np.ndarray, labels: np.ndarray) -> Image.Image:
    """The first picture of each of at most 192 classes, evenly spread, 16 to a row."""
    first = np.unique(labels, return_index=True)[1]
    chosen = np.unique(np.linspace(0, len(first) - 1, SHEET_ROWS * SHEET_COLUMNS).round().astype(int))
    shown = images[first[chosen]]
    return picture([shown[start : start + SHEET_COLUMNS] for start in range(0, len(shown), SHEET_COLUMNS)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="training.emoji.quality", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=home_path, required=True, help="folder written by training.emoji.render")
    parser.add_argument("--recogniser", type=home_path, required=True, help="its file; trained where it is missing")
    parser.add_argument("--epochs", type=positive, help="of that training (default: as many as it takes)")
    parser.add_argument("--model", help="folder of a saved TransDiffPipeline (default: the recogniser alone)")
    parser.add_argument("--per-class", type=positive, default=4, help="images of a class for each seed (default: 4)")
    parser.add_argument("--num-classes", type=positive, help="draw this many, evenly spread (default: all)")
    add_options(parser, SPLITS[1:], "a picture of each of 192 classes")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    with one_line_errors("training.emoji.quality"):
        for path in filter(None, (options.output, options.grid)):
            check_writable(path)
        if options.model is None and (options.output or options.grid):
            raise DataError("--output and --grid are of a model; name one with --model")
        pipeline = None if options.model is None else load_pipeline(options)
        judge = recogniser_for(options)
        accuracy = ", ".join(f"{100 * value:.1f}% of {name}" for name, value in judge.accuracy.items())
        print(f"recognised held-out drawings: {accuracy}, {100 * judge.ceiling:.1f}% of both")
        if pipeline is None:
            return
        result, shown = evaluate(pipeline, judge, options)
        print(markdown_table(result, MEASURES))
        if options.output:
            write_json(result, options.output)
        if options.grid:
            with new_file(options.grid) as temporary:
                shown.save(temporary, format="png")


if __name__ == "__main__":
    main()
