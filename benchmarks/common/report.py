"""Results on disk: JSON, Markdown tables and figures, each complete or not there."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib


matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from transdiff_pipelines.files import new_file


def command_line(module: str) -> str:
    """The command that runs this, without folders of this machine: a path keeps its last part."""
    shown = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return " ".join(["python -m", module, *shown])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | os.PathLike[str], result: Any) -> None:
    write_text(path, json.dumps(result, indent=1) + "\n")


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Save as PNG and close."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, its first column left-aligned and the others right-aligned.

    Raises:
        ValueError: a row has another length than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"row {row} has {len(row)} cells; expected {len(header)}, as many as {header}")
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def significant(value: float | None, digits: int = 3) -> str:
    """A number as people write it, or a dash for None."""
    if value is None:
        return "—"
    text = f"{value:.{digits}g}"
    return f"{float(text):g}" if "e" in text and 1e-4 < abs(value) < 1e6 else text
