"""A search over sampling settings: its axes, and its heat map (paper, Appendix F)."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from transdiff_pipelines.files import new_file


SEARCHED = ("guidance_scale", "drift_scale", "diffusion_scale")


def parse_axis(text: str) -> tuple[str, list[float]]:
    """`NAME=V,V,...` to the name of a setting and its values, for argparse."""
    name, _, values = text.partition("=")
    name = name.replace("-", "_")
    if name not in SEARCHED:
        raise argparse.ArgumentTypeError(f"{name!r} cannot be searched; choose one of {', '.join(SEARCHED)}")
    try:
        return name, [float(value) for value in values.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{values!r}: expected numbers with commas between them") from error


def plot_search(axes: dict[str, list[float]], rows: list[dict[str, Any]], metric: str, path: Path) -> None:
    """A heat map of the metric over the first two axes, best of the others; with one axis a line."""
    import matplotlib.pyplot as plt  # matplotlib comes with the train extra

    figure, plot = plt.subplots(figsize=(5, 4), layout="constrained")
    names = list(axes)[:2]
    best = min if metric in ("fid", "sfid", "frechet") else max

    def best_at(point: dict[str, float]) -> float:
        return best(row["metrics"][metric] for row in rows if point.items() <= row["sampling"].items())

    if len(names) == 1:
        plot.plot(axes[names[0]], [best_at({names[0]: value}) for value in axes[names[0]]], marker="o")
        plot.set(xlabel=names[0], ylabel=metric)
    else:
        grid = [[best_at(dict(zip(names, (y, x), strict=True))) for x in axes[names[1]]] for y in axes[names[0]]]
        values = np.array(grid)
        picture = plot.imshow(values, cmap="viridis_r" if best is min else "viridis")
        for (row, column), value in np.ndenumerate(values):
            good = bool(np.asarray(picture.norm(value)) < 0.5) == (
                best is min
            )  # in both colour maps this end is light
            ink = "black" if good else "white"
            plot.text(column, row, f"{value:.3g}", ha="center", va="center", color=ink, fontsize=8)
        plot.set_xticks(range(len(axes[names[1]])), [str(value) for value in axes[names[1]]])
        plot.set_yticks(range(len(axes[names[0]])), [str(value) for value in axes[names[0]]])
        plot.set(xlabel=names[1], ylabel=names[0])
        figure.colorbar(picture, label=metric)
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    plt.close(figure)
