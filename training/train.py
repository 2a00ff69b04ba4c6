"""The training loop, for 1-step and MRAR models alike: `accelerate launch -m training.train --config FILE`.

cache -> batches -> loss -> AdamW -> EMA -> checkpoints, and a pipeline folder at the end. Everything random is keyed:
a batch on its position in the data (see `data`), dropout on (seed, step, process). Together with the learning rate, a
function of the step, this makes the step number the only position there is, and resuming exact.
"""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from diffusers import AutoencoderKL
from tqdm import tqdm

from .card import write_card
from .checkpoints import CheckpointError, find_checkpoint, read_progress, save_checkpoint
from .config import ConfigError, ScheduleConfig, TrainConfig, config_or_exit, to_dict
from .data import GroupBatches, batch_loader, keyed_generator
from .ema import WeightAverage
from .latent_cache import CacheError, LatentCache, module_fingerprint
from .metrics import MetricsLog, save_preview
from .models import build_model, build_optimizer, build_pipeline


class TrainingStopped(RuntimeError):
    """Training cannot go on: too many bad steps in a row."""


class LearningRate:
    """The learning rate of each optimiser step: linear warm-up, then constant or a cosine to zero.

    Args:
        peak: the rate after the warm-up.
        schedule: lengths in steps or epochs.
        steps_per_epoch: optimiser steps in an epoch, not necessarily whole.
    """

    def __init__(self, peak: float, schedule: ScheduleConfig, steps_per_epoch: float) -> None:
        self.peak = peak
        self.decay = schedule.decay
        self.total_steps = schedule.steps or max(1, round((schedule.epochs or 0) * steps_per_epoch))
        self.warmup_steps = schedule.warmup_steps or round((schedule.warmup_epochs or 0) * steps_per_epoch)

    def at(self, step: int) -> float:
        """The rate of optimiser step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return self.peak
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


class Trainer:
    """One run: builds everything from a configuration, then `run()` trains to the end of the schedule."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        checkpoint = find_checkpoint(self.output, config.resume)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.optimizer.gradient_accumulation,
            log_with="tensorboard" if is_tensorboard_available() else None,
            project_dir=self.output,
        )
        self.cache = LatentCache(config.data.cache)
        self.vae = AutoencoderKL.from_pretrained(config.data.vae).eval().requires_grad_(False)
        self.cache.check(
            vae_fingerprint=module_fingerprint(self.vae, dict(self.vae.config)),
            image_size=config.data.image_size,
            mirror=config.data.mirror,
        )
        self._check_preview()
        module, notes = build_model(config.model, self.cache, config.seed)
        self.batches = self._batches()
        self.rate = LearningRate(self._peak_rate(), config.schedule, self.steps_per_epoch)
        self.say(*notes, self._describe_data())

        optimizer = build_optimizer(module, config.optimizer)
        self.model, self.optimizer = self.accelerator.prepare(module, optimizer)
        self.module = self.accelerator.unwrap_model(self.model)
        self.ema = WeightAverage(self.module, config.ema.decay)
        self.step = self.skipped = self.bad_in_a_row = 0
        if checkpoint is not None:
            self._load(checkpoint)

    # --- building ---

    def _batches(self) -> GroupBatches:
        data, loss = self.config.data, self.config.loss
        return GroupBatches(
            self.cache,
            group_size=self.config.model.patch_size**2,
            batch_size=data.batch_size,
            diffusion_batch_mul=loss.diffusion_batch_mul,
            label_dropout=loss.label_dropout,
            seed=self.config.seed,
            groups_per_epoch=data.groups_per_epoch,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    @property
    def groups_per_step(self) -> int:
        """The global batch: groups per optimiser step over all processes."""
        return self.batches.global_batch_size * self.config.optimizer.gradient_accumulation

    @property
    def steps_per_epoch(self) -> float:
        return self.batches.groups_per_epoch / self.groups_per_step

    def _peak_rate(self) -> float:
        optimizer = self.config.optimizer
        return optimizer.learning_rate * (self.groups_per_step / 256 if optimizer.scale_by_batch else 1)

    def _check_preview(self) -> None:
        wrong = [label for label in self.config.preview.labels if not 0 <= label < self.cache.num_classes]
        if self.config.preview.every is not None and wrong:
            raise ConfigError(
                f"preview.labels {wrong} are outside 0..{self.cache.num_classes - 1}, the data's classes"
            )

    def _describe_data(self) -> str:
        return (
            f"data: {len(self.cache)} images of {self.cache.num_classes} classes; an epoch is "
            f"{self.batches.groups_per_epoch} groups of {self.batches.group_size} image(s), "
            f"{self.steps_per_epoch:.1f} steps of {self.groups_per_step} groups; {self.rate.total_steps} steps in all "
            f"with learning rate {self.rate.peak:g} after {self.rate.warmup_steps} warm-up steps"
        )

    def say(self, *lines: str) -> None:
        """Print on the main process, without breaking the progress bar."""
        if self.accelerator.is_main_process:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    # --- the loop ---

    def run(self) -> Path:
        """Train to the end of the schedule; returns the folder of the finished pipeline.

        Raises:
            TrainingStopped: after `optimizer.max_bad_steps` bad steps in a row; a checkpoint was saved.
        """
        main = self.accelerator.is_main_process
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
            (self.output / "config.yaml").write_text(text, encoding="utf-8")
            self.metrics = MetricsLog(self.output, self.step)
        self.accelerator.init_trackers("tensorboard")
        self.model.train()
        accumulation = self.config.optimizer.gradient_accumulation
        first, last = self.step * accumulation, self.rate.total_steps * accumulation
        loader = iter(batch_loader(self.batches, first, last, self.config.data.workers))
        window = Window(self.groups_per_step * self.batches.group_size)
        with tqdm(
            total=self.rate.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not main,
            mininterval=1,
        ) as bar:
            while self.step < self.rate.total_steps:
                losses, grad_norm = self.train_step([next(loader) for _ in range(accumulation)])
                window.add(losses, grad_norm)
                bar.update()
                self._report(window, bar)
                self._save_when_due()
        final = self._finish()
        self.accelerator.end_training()  # takes the process group down
        return final

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """One optimiser step; returns the losses `(N,)` averaged over the global batch, and the gradient norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate.at(self.step)
        key = keyed_generator(self.config.seed, self.step, self.accelerator.process_index, -1)
        torch.manual_seed(key.initial_seed())  # dropout
        total = torch.zeros((), device=self.accelerator.device)
        grad_norm = torch.zeros(())
        for batch in micro_batches:
            batch = {name: tensor.to(self.accelerator.device, non_blocking=True) for name, tensor in batch.items()}
            with self.accelerator.accumulate(self.model):
                losses = self.model(**batch)
                self.accelerator.backward(losses.mean())
                total = total + losses.detach() / len(micro_batches)
                if self.accelerator.sync_gradients:
                    grad_norm = self.accelerator.clip_grad_norm_(
                        self.model.parameters(), self.config.optimizer.max_grad_norm
                    )
        losses = self.accelerator.reduce(total, reduction="mean")
        self._update(losses, float(grad_norm))
        return losses, float(grad_norm)

    def _update(self, losses: torch.Tensor, grad_norm: float) -> None:
        """Step the optimiser and the EMA, unless the loss or the gradient is not finite.

        Under fp16 an overflowing gradient is normal: the scaler skips that step itself and lowers its scale. Only
        when the scale has fallen below 1 does an overflow count as a bad step.
        """
        scaler = self.accelerator.scaler
        judged_by_scaler = scaler is not None and scaler.get_scale() >= 1
        good = bool(losses.isfinite().all()) and (judged_by_scaler or math.isfinite(grad_norm))
        if good or scaler is not None:
            self.optimizer.step()
        if good and not self.accelerator.optimizer_step_was_skipped:
            self.ema.update()
        self.optimizer.zero_grad()
        self.step += 1
        self.bad_in_a_row = 0 if good else self.bad_in_a_row + 1
        if good:
            return
        self.skipped += 1
        self.say(f"step {self.step}: loss or gradient is not finite, step skipped ({self.skipped} so far)")
        if self.bad_in_a_row >= self.config.optimizer.max_bad_steps:
            raise TrainingStopped(
                f"{self.bad_in_a_row} steps in a row had a loss or gradient that is not finite; state saved in "
                f"{self.save()}. Lower optimizer.learning_rate, or set mixed_precision to bf16 or no, and run again"
            )

    # --- reports, checkpoints ---

    def _report(self, window: Window, bar: tqdm) -> None:
        if self.step % self.config.log_every and self.step != self.rate.total_steps:
            return
        values = window.summary()
        values |= {"learning_rate": self.rate.at(self.step - 1), "epoch": self.step / self.steps_per_epoch}
        if self.accelerator.is_main_process:
            self.metrics.write({"step": self.step, **values, "skipped": self.skipped})
            bar.set_postfix(
                loss=f"{values['loss']:.4f}",
                lr=f"{values['learning_rate']:.2g}",
                img_s=f"{values['images_per_second']:.0f}",
            )
        self.accelerator.log(values, step=self.step)

    def _save_when_due(self) -> None:
        last = self.step == self.rate.total_steps
        preview_every = self.config.preview.every
        if preview_every is not None and (last or self.step % preview_every == 0):
            self.preview()
        if last or self.step % self.config.checkpoints.every == 0:
            self.save()

    def preview(self) -> None:
        """previews/step-N.png from the averaged weights, and loss.png."""
        if self.accelerator.is_main_process:
            with self.ema.applied():
                pipeline = self.pipeline()
                path = self.output / "previews" / f"step-{self.step:08d}.png"
                save_preview(pipeline, self.config.preview, self.config.seed, path)
            self.metrics.plot()
        self.accelerator.wait_for_everyone()

    def pipeline(self) -> Any:
        """The pipeline around the networks as they are now."""
        self.vae.to(self.accelerator.device)
        return build_pipeline(self.module, self.vae, self.config.sampling, self.cache.classes)

    def save(self) -> Path:
        """Write a checkpoint; all processes call this together."""
        progress = {"step": self.step, "skipped": self.skipped, "config": to_dict(self.config)}
        keep = self.config.checkpoints.keep
        return save_checkpoint(self.accelerator, self.output, progress, self._save_main, keep)

    def _save_main(self, folder: Path) -> None:
        self.ema.save(folder / "state" / "ema.safetensors")
        with self.ema.applied():
            self.pipeline().save_pretrained(folder / "pipeline")

    def _load(self, checkpoint: Path) -> None:
        progress = read_progress(checkpoint, to_dict(self.config))
        self.accelerator.load_state(str(checkpoint / "state"))
        self.ema.load(checkpoint / "state" / "ema.safetensors")
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.say(f"resumed from {checkpoint}, step {self.step} of {self.rate.total_steps}")

    def _finish(self) -> Path:
        """Put the last checkpoint's pipeline at OUTPUT/pipeline, replacing an older one as a whole."""
        final = self.output / "pipeline"
        if self.accelerator.is_main_process:
            partial = self.output / ".pipeline.partial"
            shutil.rmtree(partial, ignore_errors=True)
            self.metrics.plot()
            with self.ema.applied():
                pipeline = self.pipeline()
                pipeline.save_pretrained(partial)
            write_card(partial, pipeline, self.config, self._describe_data(), self.metrics.read())
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
        self.accelerator.wait_for_everyone()
        self.say(f"finished: {final}")
        return final


class Window:
    """Averages over the steps since the last log line."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self.clear()

    def clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.grad_norms: list[float] = []
        self.start = time.perf_counter()

    def add(self, losses: torch.Tensor, grad_norm: float) -> None:
        self.losses.append(losses.cpu())
        self.grad_norms.append(grad_norm)

    def summary(self) -> dict[str, float]:
        """Means since the last call: loss (also of each image position of several), gradient norm, speed."""
        means = torch.stack(self.losses).mean(0)
        values = {"loss": means.mean().item()}
        if len(means) > 1:
            values |= {f"loss_image_{index}": value for index, value in enumerate(means.tolist())}
        values["grad_norm"] = sum(self.grad_norms) / len(self.grad_norms)
        values["images_per_second"] = self.images_per_step * len(self.losses) / (time.perf_counter() - self.start)
        self.clear()
        return values


def main() -> None:
    config = config_or_exit("training.train")
    try:
        Trainer(config).run()
    except (ConfigError, CacheError, CheckpointError, TrainingStopped) as error:
        print(f"training.train: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
