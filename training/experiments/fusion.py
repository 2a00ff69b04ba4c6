"""Class fusion (paper, Figures 1 and 4): images under the blended conditions of two classes.

    python -m training.experiments.fusion --classes 0 1 3 8 --output results

writes fusion.png, a matrix: the first half of the condition tokens from the row's class, the second from the
column's; and fusion_strip.png, the interpolation between the first two classes, a row for each seed. With MRAR the
condition of every image of the sequence is blended. fusion.json has the settings.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from training.experiments.common import call_settings, facts, generators, load, parser, picture, write
from transdiff_pipelines import TransDiffPipeline, blend_conditions
from transdiff_pipelines.pipelines.condition_blending import PATTERNS


def fused_condition(
    pipe: TransDiffPipeline, class_labels: Sequence[str | int], weights: str | Sequence[float], seed: int
) -> Callable[[torch.Tensor | None], torch.Tensor]:
    """What `pipe(condition_embeds=...)` takes: the blend for every image of a sequence."""

    def condition(references: torch.Tensor | None) -> torch.Tensor:
        parts = [pipe.encode_condition(label, references) for label in class_labels]
        return blend_conditions(parts, weights, torch.Generator().manual_seed(seed))

    return condition


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--classes", nargs="+", required=True, help="ids or names")
    options_parser.add_argument("--pattern", choices=PATTERNS, default="halves")
    options_parser.add_argument("--weights", type=int, default=9, help="points of the interpolation")
    options_parser.add_argument("--rows", type=int, default=4, help="seeds of the interpolation")
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    classes = [int(name) if name.isdigit() else name for name in options.classes]
    settings = call_settings(options)

    def fused(pair: Sequence[str | int], weights: str | Sequence[float], seed: int) -> np.ndarray:
        condition = fused_condition(pipe, pair, weights, options.seed)
        return pipe(condition_embeds=condition, generator=generators(seed, [0]), **settings).images

    matrix = [
        np.concatenate([fused((row, column), options.pattern, options.seed) for column in classes]) for row in classes
    ]
    shares = np.linspace(0, 1, options.weights).tolist()
    strip = [
        np.concatenate([fused(classes[:2], (1 - share, share), options.seed + row) for share in shares])
        for row in range(options.rows)
    ]
    result = facts(options, pipe) | {"classes": classes, "pattern": options.pattern, "interpolation": shares}
    write(options.output, "fusion_strip", result, picture(strip))
    write(options.output, "fusion", result, picture(matrix))


if __name__ == "__main__":
    main()
