"""Quality against the number of images in a sequence (paper, Figure 7): 1-step, MRAR with p = 2, 4, 8.

    python -m training.experiments.sequence_length --models p1=FOLDER p2=FOLDER p4=FOLDER --digits data/digits \
        --output results

measures the last image of every model's sequences. A grid of s x s latents has room for p up to s: p = 8, 64 images of
one token each, needs 8 x 8. Writes sequence_length.json and sequence_length.png.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.experiments.common import add_judge_options, named_models, parser, write
from training.experiments.diversity import measure_models
from transdiff_cli.common import reader_may_leave
from transdiff_pipelines.files import new_file


TITLES = {"frechet": "Fréchet distance", "fid": "FID", "recognition": "recognised", "variance": "variance in a class"}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Each measure against the number of images, in a panel of its own; two standard errors where there is one."""
    import matplotlib.pyplot as plt  # matplotlib comes with the train extra

    measures = [name for name in TITLES if all(name in row for row in rows)]
    figure, panels = plt.subplots(
        1, len(measures), figsize=(3.2 * len(measures), 2.8), layout="constrained", squeeze=False
    )
    images = [row["images_in_sequence"] for row in rows]
    for panel, measure in zip(panels[0], measures, strict=True):
        errors = [2 * row.get(f"{measure}_error", 0) for row in rows]
        panel.errorbar(images, [row[measure] for row in rows], yerr=errors, fmt="o", capsize=3)
        for row in rows:
            panel.annotate(row["name"], (row["images_in_sequence"], row[measure]), (5, 3), textcoords="offset points")
        panel.set_xscale("log", base=2)
        panel.set_xticks(images, [str(count) for count in images])
        panel.set(xlabel="images in a sequence", title=TITLES[measure])
        panel.margins(x=0.2)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90)
    plt.close(figure)


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options_parser = parser(__doc__)
    options_parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER")
    add_judge_options(options_parser)
    options = options_parser.parse_args(arguments)
    if not (options.digits or options.emoji or options.reference):
        options_parser.error(
            "pass --digits, --emoji or --reference: without real images there is no quality to measure"
        )
    rows = measure_models(options, named_models(options.models))
    write(options.output, "sequence_length", {"num_images": options.num_images, "rows": rows})
    plot(rows, options.output / "sequence_length.png")


if __name__ == "__main__":
    main()
