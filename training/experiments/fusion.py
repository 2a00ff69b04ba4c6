"""Class fusion (paper, Figures 1 and 4): images under the blended conditions of two classes.

    python -m training.experiments.fusion --classes 0 1 3 8 --output results

writes fusion.png, a matrix: the first half of the condition tokens from the row's class, the second from the
column's; and fusion_strip.png, the interpolation between the first two classes, a row for each seed. With MRAR the
condition of every image of the sequence is blended. fusion.json has the settings. With `--digits` it also has what a
recogniser trained on real digits sees in each square of the matrix, over `--count` images.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from training.digits.quality import Reference, pooled_pixels
from training.experiments.common import call_settings, facts, generators, load, parser, picture, write
from transdiff_pipelines import TransDiffPipeline, blend_conditions
from transdiff_pipelines.files import home_path
from transdiff_pipelines.pipelines.condition_blending import PATTERNS


def fused_condition(
    pipe: TransDiffPipeline, class_labels: Sequence[str | int], weights: str | Sequence[float], seed: int
) -> Callable[[torch.Tensor | None], torch.Tensor]:
    """What `pipe(condition_embeds=...)` takes: the blend for every image of a sequence."""

    def condition(references: torch.Tensor | None) -> torch.Tensor:
        parts = [pipe.encode_condition(label, references) for label in class_labels]
        return blend_conditions(parts, weights, torch.Generator().manual_seed(seed))

    return condition


def recognised_shares(pairs: Sequence[tuple[Any, Any]], labels: np.ndarray) -> dict[str, float]:
    """Where two classes were fused: shares of the labels `(pairs, n)` seen that are the row's class, the column's, or
    another.
    """
    seen = Counter[str]()
    for (row, column), made in zip(pairs, labels, strict=True):
        if row != column:
            seen.update("row" if label == row else "column" if label == column else "other" for label in made)
    return {name: seen[name] / max(seen.total(), 1) for name in ("row", "column", "other")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--classes", nargs="+", required=True, help="ids or names")
    options_parser.add_argument("--pattern", choices=PATTERNS, default="halves")
    options_parser.add_argument("--weights", type=int, default=9, help="points of the interpolation")
    options_parser.add_argument("--rows", type=int, default=4, help="seeds of the interpolation")
    options_parser.add_argument(
        "--digits", type=home_path, help="digits data (training.digits.export): also recognise the images"
    )
    options_parser.add_argument("--count", type=int, default=50, help="images of a square that are recognised")
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    classes = [int(name) if name.isdigit() else name for name in options.classes]
    settings = call_settings(options)

    def fused(pair: Sequence[str | int], weights: str | Sequence[float], seed: int, count: int = 1) -> np.ndarray:
        condition = fused_condition(pipe, pair, weights, options.seed)
        make = generators(seed, range(count))
        return pipe(condition_embeds=condition, num_images_per_label=count, generator=make, **settings).images

    matrix = [
        np.concatenate([fused((row, column), options.pattern, options.seed) for column in classes]) for row in classes
    ]
    shares = np.linspace(0, 1, options.weights).tolist()
    strip = [
        np.concatenate([fused(classes[:2], (1 - share, share), options.seed + row) for share in shares])
        for row in range(options.rows)
    ]
    result = facts(options, pipe) | {"classes": classes, "pattern": options.pattern, "interpolation": shares}
    if options.digits:
        recogniser = Reference(options.digits, "test").recogniser
        pairs = [(row, column) for row in classes for column in classes]
        made = [pooled_pixels(fused(pair, options.pattern, options.seed, options.count)) for pair in pairs]
        labels = np.stack([recogniser.predict(pixels) for pixels in made])
        result["recognised"] = {
            "images_in_a_square": options.count,
            "fused": recognised_shares(pairs, labels),
        }
        print(result["recognised"]["fused"])
    write(options.output, "fusion_strip", result, picture(strip))
    write(options.output, "fusion", result, picture(matrix))


if __name__ == "__main__":
    main()
