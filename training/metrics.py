"""What a run reports: metrics.jsonl, the loss curve as a picture, TensorBoard where it is installed, preview grids."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from transdiff_pipelines import TransDiffPipeline

from .config import PreviewConfig


class MetricsLog:
    """metrics.jsonl of a run, one JSON object a line; lines after `step`, of a run that was killed, are cut off."""

    def __init__(self, output: Path, step: int) -> None:
        self.path = output / "metrics.jsonl"
        kept = [line for line in self.read() if line["step"] <= step]
        temporary = self.path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.endswith("}")]  # a kill may leave half a last line

    def write(self, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")

    def plot(self) -> None:
        """loss.png: the training loss, raw and smoothed, over optimiser steps."""
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
        axes.grid(alpha=0.3, which="both")
        axes.legend()
        temporary = self.path.with_name(".loss.partial.png")
        figure.savefig(temporary, dpi=120)
        os.replace(temporary, self.path.with_name("loss.png"))


def smooth(values: list[float], decay: float) -> list[float]:
    """Exponential moving average without the bias of its start."""
    average, weight, smoothed = 0.0, 0.0, []
    for value in values:
        average, weight = decay * average + (1 - decay) * value, decay * weight + (1 - decay)
        smoothed.append(average / weight)
    return smoothed


def image_grid(images: list[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Images of one size, row by row, on white."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    return grid


def save_preview(pipeline: TransDiffPipeline, preview: PreviewConfig, seed: int, path: Path) -> None:
    """A grid with one column per label, always from the same noise, so that previews of a run can be compared."""
    pipeline.set_progress_bar_config(disable=True)
    labels = preview.labels * preview.rows
    generator = torch.Generator().manual_seed(seed)
    images = pipeline(labels, num_inference_steps=preview.num_inference_steps, generator=generator).images
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.png")
    image_grid(images, len(preview.labels)).save(temporary)
    os.replace(temporary, path)
