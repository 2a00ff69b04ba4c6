"""What a run reports: metrics.jsonl, the loss curve as a picture, preview grids, speed."""

from __future__ import annotations

import itertools
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image, ImageOps

from training.settings.config import PreviewConfig
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import new_file


class MetricsLog:
    """A file of a run with one JSON object a line: metrics.jsonl on training, validation.jsonl on held-out images.

    A run that was killed may have logged steps after its last checkpoint. It continues from that checkpoint, so the
    lines after `step` are removed when the log is opened.
    """

    def __init__(self, output: Path, step: int, name: str = "metrics.jsonl") -> None:
        self.path = output / name
        kept = [line for line in self.read() if line["step"] <= step]
        with new_file(self.path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [
            json.loads(line) for line in lines if line.endswith("}")
        ]  # if the run was killed while it wrote, the last line is incomplete

    def write(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def plot(self, validation: MetricsLog | None = None) -> None:
        """loss.png: the training loss, raw and smoothed, over optimiser steps, and the loss on held-out images."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        lines = self.read()
        if len(lines) < 2:
            return
        steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel="optimiser step", ylabel="velocity loss", yscale="log")
        axes.plot(steps, losses, color="#9bbcdc", linewidth=0.8, label="mean between log lines")
        axes.plot(steps, smooth(losses, 0.95), color="#1f4e79", label="smoothed")
        held_out = validation.read() if validation is not None else []
        for name, colour in (("raw", "#e0a070"), ("ema", "#b04a00")) if held_out else ():
            values = [line[f"validation_loss_{name}"] for line in held_out]
            label = f"held-out images, {name.replace('ema', 'averaged')} weights"
            axes.plot([line["step"] for line in held_out], values, ".-", color=colour, label=label)
        axes.grid(alpha=0.3, which="both")
        if max(losses) < 10 * min(
            losses
        ):  # labels at powers of ten alone would be too few on an axis that covers less than a decade
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
        with new_file(self.path.with_name("loss.png")) as temporary:
            figure.savefig(temporary, format="png", dpi=120)


def smooth(values: list[float], decay: float) -> list[float]:
    """Exponential moving average, corrected for starting at zero; values that are not finite are left out."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight if weight else value)
    return smoothed


def save_preview(pipeline: TransDiffPipeline, preview: PreviewConfig, seed: int, path: Path) -> Image.Image:
    """A grid with one column per label, always from the same noise, so that previews of a run can be compared."""
    pipeline.set_progress_bar_config(disable=True)
    columns = preview.labels or []
    generator = torch.Generator().manual_seed(seed)
    labels, steps = columns * preview.rows, preview.num_inference_steps
    images = pipeline(labels, num_inference_steps=steps, generator=generator).images
    framed = [ImageOps.expand(image, border=1, fill="white") for image in images]
    grid = make_image_grid(framed, preview.rows, len(columns))
    with new_file(path) as temporary:
        grid.save(temporary, format="PNG")
    return grid


def moment(device: torch.device) -> Any:
    """The present moment; on a GPU an event in its queue, so that the program does not wait for the GPU."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Any, end: Any) -> float:
    """Seconds from one `moment` to another. A GPU must have worked through its queue up to both (`Stopwatch.now`)."""
    return start.elapsed_time(end) / 1000 if isinstance(start, torch.cuda.Event) else end - start


class Stopwatch:
    """Measures the seconds spent in named parts of the loop, including the work of a GPU.

    `with watch.timing("data"): ...` adds the time of the block to the part "data".
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.clear()

    def clear(self) -> None:
        self.start = time.perf_counter()
        self.timed: list[tuple[str, Any, Any]] = []

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = moment(self.device)
        yield
        self.timed.append((name, start, moment(self.device)))

    def seconds(self) -> dict[str, float]:
        """The seconds of each named part since the last `clear`."""
        self.now()
        total: dict[str, float] = {}
        for name, start, end in self.timed:
            total[name] = total.get(name, 0.0) + seconds_between(start, end)
        return total

    def now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the last `clear`."""
        return time.perf_counter() - self.start


class PeakMemory:
    """`with PeakMemory(device) as peak: …` then `peak.bytes`: the most memory in use above what was before.

    On a CPU torch's profiler counts what is allocated in the block. This slows the block down, so do not time it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes = 0

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise the profiler prints a line on the terminal
            self._profiler = torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
            )
            self._profiler.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._profiler.__exit__(*error)
        profiler: Any = self._profiler.profiler
        events = profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        self.bytes = max(itertools.accumulate((change for _, change in changes), initial=0))


class Window:
    """Averages over the steps since the last log line."""

    def __init__(self, images_per_step: int, watch: Stopwatch) -> None:
        self.images_per_step, self.watch = images_per_step, watch
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.grad_norms: list[float] = []
        self.watch.clear()

    def add(self, losses: torch.Tensor, grad_norm: float) -> None:
        """A step's losses `(N,)`, on the CPU, and the norm of its gradients."""
        self.losses.append(losses)
        self.grad_norms.append(grad_norm)

    def summary(self) -> dict[str, float]:
        """Means since the last call: loss (also of each image position of several), gradient norm, speed.

        `outside_fraction` is the share of the time that was not spent in forward and backward passes but on data,
        optimiser, checkpoints and previews; `data_fraction` is the share spent waiting for batches,
        `encoding_fraction` that of moving them to the device and encoding images that are not cached.
        """
        losses = torch.stack(self.losses)
        good = losses.isfinite().all(1)  # steps whose loss was not finite were skipped
        means = (losses[good] if good.any() else losses).mean(0)
        values = {"loss": means.mean().item()}
        if len(means) > 1:
            values |= {f"loss_image_{index}": value for index, value in enumerate(means.tolist())}
        seconds, elapsed = self.watch.seconds(), self.watch.elapsed()
        norms = [norm for norm in self.grad_norms if math.isfinite(norm)]
        values["grad_norm"] = sum(norms) / len(norms) if norms else math.nan
        values["images_per_second"] = self.images_per_step * len(self.losses) / elapsed
        values["outside_fraction"] = 1 - seconds.get("passes", 0.0) / elapsed
        for name in ("data", "encoding"):
            values[f"{name}_fraction"] = seconds.get(name, 0.0) / elapsed
        self.clear()
        return values
