"""Variations of given images: MRAR sequences that start with pictures of yours in place of generated ones.

    python -m training.experiments.variations --digits data/digits --output results

takes real test images as references, n = 0 ... N - 1 of them, and measures the last image of the sequence: quality,
and whether it is nearer to its own references than to those of another image of its class.
`--pictures FILE ... --class-label LABEL` uses pictures of yours instead and measures nothing. Writes variations.json
and variations.png (a row for each class or seed: the references, then variations).
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from training.digits.quality import load_split, pooled_pixels
from training.evaluation.quality import nearest_neighbour_distance
from training.experiments.common import (
    add_judge_options,
    balanced,
    call_settings,
    facts,
    generators,
    load,
    make_judge,
    parser,
    picture,
    write,
)
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines import TransDiffPipeline


SHOWN = 6


def pick_references(images: np.ndarray, labels: np.ndarray, wanted: np.ndarray, count: int) -> np.ndarray:
    """`(len(wanted), count, H, W, 3)`: images of each wanted class, going through them in order."""
    pools = {label: np.flatnonzero(labels == label) for label in np.unique(wanted)}
    used = dict.fromkeys(pools, 0)
    chosen = []
    for label in wanted:
        positions = (used[label] + np.arange(count)) % len(pools[label])
        used[label] += count
        chosen.append(images[pools[label][positions]])
    return np.stack(chosen)


def of_digits(options: argparse.Namespace, pipe: TransDiffPipeline) -> tuple[dict[str, Any], Any]:
    """Quality of the last image against the number of real references, and its distance to the nearest of these.

    Beside it the distance to as many references of another image of the class: what any digit of the class has.
    """
    judge = make_judge(options, pipe)
    num_images, num_classes = pipe.condition_encoder.num_images, pipe.condition_encoder.config.num_classes
    labels = balanced(options.num_images, num_classes)
    real = pick_references(*load_split(options.digits, "test"), labels, num_images - 1)

    def last_images(labels: np.ndarray, references: np.ndarray) -> np.ndarray:
        made = []
        for indices in np.array_split(np.arange(len(labels)), -(-len(labels) // options.batch_size)):
            given = [list(group) for group in references[indices]] if references.shape[1] else None
            make = generators(options.seed, indices.tolist())
            settings = call_settings(options) | {"reference_images": given}
            made.append(pipe(labels[indices].tolist(), generator=make, **settings).images)
        return np.concatenate(made)

    rows = []
    for count in range(num_images):
        images = last_images(labels, real[:, :count])
        row = {"references": count, **judge(images, labels)}
        if count:
            own = np.stack([pooled_pixels(group) for group in real[:, :count]])
            others = np.roll(own, -num_classes, axis=0)
            row |= {"own_reference": nearest(images, own), "reference_of_another": nearest(images, others)}
        rows.append(row)
        print(row)
    shown = np.repeat(np.arange(num_classes), SHOWN)
    variations = last_images(shown, real[shown]).reshape(num_classes, SHOWN, *real.shape[2:])
    return {"num_images": len(labels), "rows": rows}, picture(
        list(np.concatenate([real[:num_classes], variations], 1))
    )


def nearest(images: np.ndarray, references: np.ndarray) -> float:
    """Mean distance of each image to the nearest of its own row of references `(N, n, 64)`."""
    pairs = zip(pooled_pixels(images), references, strict=True)
    return float(np.mean([nearest_neighbour_distance(pixel[None], group) for pixel, group in pairs]))


def of_pictures(options: argparse.Namespace, pipe: TransDiffPipeline) -> tuple[dict[str, Any], Any]:
    """Several variations of the pictures given."""
    label = int(options.class_label) if options.class_label.isdigit() else options.class_label
    images = pipe(
        [label] * SHOWN,
        reference_images=[list(options.pictures)] * SHOWN,
        generator=generators(options.seed, range(SHOWN)),
        **call_settings(options),
    ).images
    return {"class_label": label, "pictures": list(options.pictures)}, picture([images])


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    add_judge_options(options_parser)
    options_parser.add_argument("--pictures", nargs="+", help="picture files, at most N - 1")
    options_parser.add_argument("--class-label", help="what the pictures show")
    options = options_parser.parse_args(arguments)
    if bool(options.pictures) == bool(options.digits) or bool(options.pictures) != bool(options.class_label):
        options_parser.error("pass --digits, or --pictures together with --class-label")
    pipe = load(options)
    with torch.no_grad():
        result, shown = (of_pictures if options.pictures else of_digits)(options, pipe)
    write(options.output, "variations", facts(options, pipe) | result, shown)


if __name__ == "__main__":
    main()
