"""The results of `benchmarks.gpu` as JSON, Markdown and pictures."""

from pathlib import Path
from typing import Any

from ..common.report import plt, save_figure, write_json, write_text
from ..sampling import row_name
from .parts import PARTS


def write(result: dict[str, Any], output: Path) -> None:
    """`output`.json and .md, and where there is something to draw .png and _training.png; each is replaced whole."""
    write_json(output.with_suffix(".json"), result)
    write_text(output.with_suffix(".md"), markdown(result))
    sampled, trained = sampling_rows(result), training_rows(result)
    if sampled:
        milliseconds = {row_name(row): 1e3 * row["median_step_seconds"] for row in sampled}
        save_figure(bars(milliseconds, "milliseconds a denoising step (median)"), output.with_suffix(".png"))
    if trained:
        path = output.with_name(f"{output.name}_training.png")
        save_figure(bars(trained, "images a second in training (median)"), path)


def markdown(result: dict[str, Any]) -> str:
    """A section for each part, with its table or the reason why there is none."""
    machine, tables = result["machine"], {part.name: part.table for part in PARTS}
    lines = [f"`{result['command']}`", machine_line(machine)]
    if result["rehearsal"]:
        lines.append("**A rehearsal with tiny models: no number here means anything.**")
    for name, outcome in result["parts"].items():
        lines.append(f"### {name}: {outcome.get('question', '')}")
        if outcome["status"] == "done":
            lines.append(tables[name](outcome["result"]).strip() if name in tables else "")
            lines.append(f"*{outcome['seconds']:.0f} s, {outcome['date']}.*")
        else:
            lines.append(f"{outcome['status']} after {outcome['seconds']:.0f} s: {outcome['reason']}")
    return "\n\n".join(lines) + "\n"


def machine_line(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, {machine['cores']} processor cores, torch {machine['torch']}, diffusers "
        f"{machine['diffusers']}, Python {machine['python']}, {machine['date']}."
    )


def finished(result: dict[str, Any], beginning: str) -> list[dict[str, Any]]:
    """The results of the finished parts whose names begin so."""
    parts = result["parts"].items()
    return [part["result"] for name, part in parts if name.startswith(beginning) and part["status"] == "done"]


def sampling_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [part for beginning in ("sampling", "flow_map", "dit") for part in finished(result, beginning)]
    return [row for part in parts for setting in part["settings"] for row in setting["rows"]]


def training_rows(result: dict[str, Any]) -> dict[str, float]:
    return {
        f"{part['model']} · {row['name']}": part["images"] / row["median_seconds"]
        for part in finished(result, "training")
        for row in part["rows"]
    }


def bars(values: dict[str, float], label: str) -> Any:
    """A bar for each name."""
    drawn, axes = plt.subplots(figsize=(9, 0.3 * len(values) + 1))
    positions = range(len(values))
    container = axes.barh(positions, list(values.values()), color="#1f4e79")
    axes.bar_label(container, fmt="%.3g", fontsize=7, padding=3)
    axes.set_yticks(positions, list(values), fontsize=8)
    axes.invert_yaxis()
    axes.set(xscale="log", xlabel=label)
    return drawn
