"""How time and memory of a call grow with batch, steps, resolution and images of an MRAR sequence.

    python -m benchmarks.growth --decoder-layers 4 --output growth

writes `growth.json`, `growth.md` and `growth.png`. One quantity grows, the others stay at batch 1, 4 steps, 256 px and
1-step AR; no guidance. The slope in the log-log plot is fitted to all points: 1 is proportional growth.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import LogLocator, NullLocator

from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path
from transdiff_pipelines.presets import published_model

from .common.machine import DTYPES, CallClock, PeakMemory, describe
from .common.peers import OurPipeline, Setting, random_pipeline
from .common.report import command_line, markdown_table, plt, save_figure, significant, write_json, write_text


@dataclass(frozen=True)
class Axis:
    """A quantity that grows; `unit` is what the plot counts."""

    name: str
    unit: str
    values: tuple[int, ...]
    steps: int = 4


AXES = (
    Axis("batch size", "images", (1, 2, 4, 8)),
    Axis("steps", "steps", (2, 4, 8, 16)),
    Axis("resolution", "latent tokens", (64, 256, 1024)),
    Axis("images in a sequence", "images", (1, 4, 16, 64), steps=1),
)


def setting_at(axis: Axis, value: int, base: Setting) -> Setting:
    """The base setting with `axis` at `value`."""
    base = replace(base, steps=axis.steps)
    if axis.name == "batch size":
        return replace(base, batch_size=value)
    if axis.name == "steps":
        return replace(base, steps=value)
    if axis.name == "resolution":
        return replace(base, model=replace(base.model, resolution=16 * math.isqrt(value)))
    return replace(base, model=replace(base.model, patch_size=math.isqrt(value)))


def point(axis: Axis, value: int, base: Setting, rounds: int) -> dict[str, Any]:
    """Time and working memory with `axis` at `value`, after a call that is not counted."""
    setting = setting_at(axis, value, base)
    pipeline = random_pipeline(replace(setting.model, guidance_scale=1.0)).to(setting.dtype)
    ours = OurPipeline(setting, pipeline)
    ours.sample(1)
    clocks = [CallClock(setting.device, ours.network) for _ in range(rounds)]
    for clock in clocks:
        clock.time(lambda: ours.sample(setting.steps))
    with PeakMemory(setting.device) as peak:
        ours.sample(setting.steps)
    return {
        "value": value,
        "seconds": statistics.median(clock.total for clock in clocks),
        "cpu_seconds": statistics.median(clock.cpu for clock in clocks),
        "working_bytes": peak.bytes,
    }


def slope(values: Sequence[float], results: Sequence[float]) -> float:
    """The slope of a straight line through the logarithms, by least squares."""
    return float(np.polyfit(np.log(values), np.log(results), 1)[0])


def markdown(result: dict[str, Any]) -> str:
    """Points and slopes as a Markdown table."""
    rows = []
    for axis in result["axes"]:
        for point in axis["points"]:
            rows.append([
                axis["name"],
                f"{point['value']} {axis['unit']}",
                significant(point["seconds"]),
                significant(point["cpu_seconds"]),
                significant(point["working_bytes"] / 1e6),
                f"{axis['time_slope']:.2f}",
                f"{axis['memory_slope']:.2f}",
            ])  # fmt: skip
    machine = result["machine"]
    header = ["axis", "value", "call, s", "processor time, s", "working memory, MB", "slope of time", "of memory"]
    introduction = (
        f"{result['model']}; {machine['processor']}, {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}, {machine['date']}."
    )
    return "\n\n".join([f"`{result['command']}`", introduction, markdown_table(header, rows)])


def figure(result: dict[str, Any]) -> Any:
    """Time above, memory below, one column an axis, log-log, with the fitted lines."""
    columns = len(result["axes"])
    drawn, panels = plt.subplots(2, columns, figsize=(3 * columns, 5.5), squeeze=False, sharey="row")
    for column, axis in enumerate(result["axes"]):
        values = [point["value"] for point in axis["points"]]
        quantities = [
            ("seconds", axis["time_slope"], [point[result["time"]] for point in axis["points"]]),
            ("working memory, MB", axis["memory_slope"], [point["working_bytes"] / 1e6 for point in axis["points"]]),
        ]
        for panel, (name, power, numbers) in zip(panels[:, column], quantities, strict=True):
            fitted = [value**power for value in values]
            scale = np.exp(np.mean(np.log(numbers)) - np.mean(np.log(fitted)))
            panel.loglog(values, numbers, "o")
            panel.loglog(values, [scale * value for value in fitted], "--", color="0.5", zorder=0)
            panel.set(title=f"{axis['name']}: slope {power:.2f}", xlabel=axis["unit"])
            panel.set_xticks(values, labels=[str(value) for value in values], minor=False)
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter("{x:g}")
            for scaled in (panel.xaxis, panel.yaxis):
                scaled.set_minor_locator(NullLocator())
            if column == 0:
                panel.set_ylabel(name)
    drawn.tight_layout()
    return drawn


def grow(axis: Axis, base: Setting, rounds: int, time: str) -> dict[str, Any]:
    """All points of an axis and the slopes through them."""
    points = [point(axis, value, base, rounds) for value in axis.values]
    return {
        "name": axis.name,
        "unit": axis.unit,
        "points": points,
        "time_slope": slope(axis.values, [entry[time] for entry in points]),
        "memory_slope": slope(axis.values, [entry["working_bytes"] for entry in points]),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="transdiff_b", help="published model whose width and heads to take")
    parser.add_argument("--decoder-layers", type=int, help="fewer blocks than it has; the encoder has twice as many")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument(
        "--time", choices=["seconds", "cpu_seconds"], default="seconds", help="what slopes are fitted to"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=home_path, required=True, help="results go to OUTPUT.json, .md and .png")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    model, device = published_model(options.model), torch.device(options.device)
    layers = options.decoder_layers or model.size.decoder_layers
    size = replace(model.size, decoder_layers=layers, encoder_layers=2 * layers)
    base = Setting(replace(model, size=size), 1, 4, DTYPES[options.dtype], "off", device)
    result: dict[str, Any] = {
        "command": command_line("benchmarks.growth"),
        "machine": describe(device),
        "model": f"width {size.width}, {layers} decoder blocks, {2 * layers} encoder blocks, {options.dtype}",
        "time": options.time,
        "axes": [],
    }
    for axis in AXES:
        result["axes"].append(grow(axis, base, options.rounds, options.time))
        write_json(options.output.with_suffix(".json"), result)
        write_text(options.output.with_suffix(".md"), markdown(result))
        save_figure(figure(result), options.output.with_suffix(".png"))
    print(markdown(result))


if __name__ == "__main__":
    main()
