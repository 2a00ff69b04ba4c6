"""What a run tells while it goes on: lines on the terminal, metrics, validation, previews and trackers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from PIL import Image
from torch import nn
from tqdm import tqdm

from training.distributed.engine import Engine
from training.model.build import TrainingModel
from training.model.ema import WeightAverage
from training.settings.config import PreviewConfig, TrainConfig

from .export import Export
from .metrics import MetricsLog, save_preview
from .trackers import log_image, start_trackers
from .validation import Validation


class Reports:
    """The reports of a run; the main process writes them. A file that cannot be written is a warning, not the end.

    Args:
        config: of the run.
        accelerator: of the run; all processes call each method together.

    Attributes:
        metrics, validations: the logs of training and of held-out images, once the run has begun, on the main process.
    """

    metrics: MetricsLog | None = None
    validations: MetricsLog | None = None

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.output = Path(config.output)

    def say(self, *lines: str) -> None:
        """Print on the main process, without breaking the progress bar."""
        if self.accelerator.is_main_process:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def begin(self, step: int, validates: bool) -> None:
        """Open the logs, from which lines after `step` are cut off, and the trackers."""
        if self.accelerator.is_main_process:
            self.metrics = MetricsLog(self.output, step)
            if validates:
                self.validations = MetricsLog(self.output, step, "validation.jsonl")
        start_trackers(self.accelerator, self.config)

    @contextmanager
    def warned(self, step: int, name: str) -> Iterator[None]:
        """A report that cannot be written, on a full disk for instance, does not end the run."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: step {step}: {name} cannot be written ({error})")

    def training(self, step: int, values: dict[str, float], skipped: int) -> None:
        """A line of metrics.jsonl, and the trackers."""
        if self.metrics is not None:
            with self.warned(step, "metrics.jsonl"):
                self.metrics.write({"step": step, **values, "skipped": skipped})
        self.accelerator.log(values, step=step)

    def validate(self, step: int, validation: Validation, module: nn.Module, ema: WeightAverage) -> None:
        """The loss on held-out images, of raw and of averaged weights: into validation.jsonl and the trackers."""
        values = {"validation_loss_raw": validation.loss(module)}
        with ema.applied():
            values["validation_loss_ema"] = validation.loss(module)
        if self.validations is not None:
            with self.warned(step, "validation.jsonl"):
                self.validations.write({"step": step, **values})
        self.accelerator.log(values, step=step)
        self.say(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def preview(self, step: int, preview: PreviewConfig, engine: Engine, ema: WeightAverage, export: Export) -> None:
        """previews/step-N.png from the averaged weights, step-N-raw.png from the raw ones, and loss.png."""

        def draw(name: str, file: str) -> None:
            networks = engine.whole_networks()
            if self.accelerator.is_main_process:
                with self.warned(step, file):
                    grid = self.draw(export, networks, preview, file)
                    log_image(self.accelerator, name, grid, step)

        draw("samples_raw", f"step-{step:08d}-raw.png")
        with ema.applied():
            draw("samples_ema", f"step-{step:08d}.png")
        with self.warned(step, "loss.png"):
            self.plot()
        self.accelerator.wait_for_everyone()

    def draw(self, export: Export, networks: TrainingModel, preview: PreviewConfig, file: str) -> Image.Image:
        """Save a preview of the networks as they are, and leave them in the mode that they were in."""
        training = networks.training
        networks.eval()
        try:
            return save_preview(export.pipeline(networks), preview, self.config.seed, self.output / "previews" / file)
        finally:
            networks.train(training)

    def plot(self) -> None:
        """loss.png, from both logs."""
        if self.metrics is not None:
            self.metrics.plot(self.validations)
