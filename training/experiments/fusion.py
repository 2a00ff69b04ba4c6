"""Class fusion (paper, Figures 1 and 4): images under the blended conditions of two classes.

    python -m training.experiments.fusion --classes 0 1 3 8 --output results

writes fusion.png, a matrix: the first half of the condition tokens from the row's class, the second from the
column's; and fusion_strip.png, the interpolation between the first two classes, a row for each seed. With MRAR the
condition of every image of the sequence is blended. fusion.json has the settings. With `--digits` or `--emoji` it also
has what a recogniser trained on real images sees in each square of the matrix, over `--count` images: the highest
class, and how often the two classes that were fused are the two highest.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from training.digits.quality import Reference, pooled_pixels
from training.experiments.common import (
    add_recogniser_options,
    call_settings,
    emoji_judge,
    facts,
    generators,
    load,
    parser,
    picture,
    write,
)
from transdiff_cli.common import reader_may_leave
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


def recognised_shares(pairs: Sequence[tuple[Any, Any]], labels: np.ndarray) -> dict[str, float]:
    """Where two classes were fused: shares of the labels `(pairs, n)` seen that are the row's class, the column's, or
    another.
    """
    seen = Counter[str]()
    for (row, column), made in zip(pairs, labels, strict=True):
        if row != column:
            seen.update("row" if label == row else "column" if label == column else "other" for label in made)
    return {name: seen[name] / max(seen.total(), 1) for name in ("row", "column", "other")}


def recogniser(options: argparse.Namespace) -> Callable[[np.ndarray], np.ndarray] | None:
    """Images `(n, H, W, 3)` in [0, 1] to the two highest classes `(n, 2)` of each; None without real images."""
    if options.digits:
        machine = Reference(options.digits, "test").recogniser

        def of_digits(images: np.ndarray) -> np.ndarray:
            rows = pooled_pixels(images)
            highest = machine.predict(rows)
            scores = machine.decision_function(rows)
            scores[np.arange(len(rows)), highest] = -np.inf  # it breaks ties in its own way
            return np.stack([highest, scores.argmax(1)], axis=1)

        return of_digits
    if options.emoji:
        judge = emoji_judge(options)
        return lambda images: np.argsort(-judge.recogniser.judge(images)[1], axis=1)[:, :2]
    return None


def in_words(pairs: Sequence[tuple[int, int]], seen: np.ndarray, names: Mapping[int, str]) -> list[dict[str, Any]]:
    """What was seen in each square off the diagonal, from the two highest classes `(pairs, n, 2)`."""
    rows = []
    for pair, highest in zip(pairs, seen, strict=True):
        if pair[0] != pair[1]:
            counts = Counter(names.get(label, str(label)) for label in highest[:, 0].tolist())
            both = float(np.mean([set(two) == set(pair) for two in highest.tolist()]))
            fused = " + ".join(names.get(label, str(label)) for label in pair)
            rows.append({"fused": fused, "both_are_highest": both, "seen": dict(counts.most_common(3))})
    return rows


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--classes", nargs="+", required=True, help="ids or names")
    options_parser.add_argument("--pattern", choices=PATTERNS, default="halves")
    options_parser.add_argument("--weights", type=int, default=9, help="points of the interpolation")
    options_parser.add_argument("--rows", type=int, default=4, help="seeds of the interpolation")
    add_recogniser_options(options_parser, "also recognise the images")
    options_parser.add_argument("--count", type=int, default=50, help="images of a square that are recognised")
    options = options_parser.parse_args(arguments)
    pipe = load(options)
    recognise = recogniser(options)
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
    if recognise is not None:
        ids = [name if isinstance(name, int) else pipe.get_label_ids(name)[0] for name in classes]
        pairs = [(row, column) for row in ids for column in ids]
        seen = np.stack([recognise(fused(pair, options.pattern, options.seed, options.count)) for pair in pairs])
        names = {int(label): name for label, name in (pipe.config.id2label or {}).items()}
        result["recognised"] = {
            "images_in_a_square": options.count,
            "fused": recognised_shares(pairs, seen[..., 0]),
            "squares": in_words(pairs, seen, names),
        }
        print(result["recognised"]["fused"])
    write(options.output, "fusion_strip", result, picture(strip))
    write(options.output, "fusion", result, picture(matrix))


if __name__ == "__main__":
    main()
