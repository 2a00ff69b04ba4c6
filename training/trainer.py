"""The training loop, for 1-step and MRAR models alike.

latents or images -> batches -> loss -> AdamW -> EMA -> checkpoints, and a pipeline folder at the end. Everything
random is keyed: a batch on its position in the data (see `data.batches`), dropout on (seed, step, process). Together
with the learning rate, a function of the step, this makes the step number the only position there is, and resuming
exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from training.data.batches import GroupBatches, batch_loader, keyed_generator, more_workers_than_cores
from training.data.folders import check_outside
from training.data.held_out import held_out_images
from training.data.image_dataset import ImageData, Unreadable, changed_files, open_data
from training.data.labels import without_images
from training.data.vae import PixelEncoder, load_vae, module_fingerprint
from training.distributed.engine import Engine, ReplicatedEngine, Step
from training.distributed.fsdp2 import Fsdp2Engine
from training.distributed.interruption import StopRequest, TrainingInterrupted, TrainingStopped
from training.distributed.processes import start_accelerator
from training.distributed.zero2 import Zero2Engine, check_deepspeed
from training.model.build import TrainingModel, build_model, starting_folder, teacher_guidance
from training.model.ema import WeightAverage
from training.model.flow_map import FlowMapTeacher
from training.model.schedule import LearningRate
from training.outputs.checkpoints import (
    READ_ERRORS,
    BrokenCheckpointError,
    CheckpointError,
    find_checkpoints,
    load_process_state,
    read_progress,
    remove_leftovers,
    resume_from,
    save_checkpoint,
    set_aside,
)
from training.outputs.export import Export
from training.outputs.metrics import Stopwatch, Window
from training.outputs.publish import check_repository, publish
from training.outputs.reports import Reports
from training.outputs.trackers import check_trackers
from training.outputs.validation import Validation
from training.settings.config import ConfigError, PreviewConfig, TrainConfig, accumulation_steps, to_dict
from transdiff_pipelines.files import check_folder_writable
from transdiff_pipelines.half_precision import half_precision_note


MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.bin"
ENGINES: dict[str, type[Engine]] = {"no": ReplicatedEngine, "fsdp2": Fsdp2Engine, "zero2": Zero2Engine}


class Trainer:
    """One run: builds everything from a configuration, then `run()` trains to the end of the schedule."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        if config.data.images is not None:
            check_outside(self.output, Path(config.data.images), "output")
        try:
            check_folder_writable(self.output)
        except OSError as error:
            raise ConfigError(str(error)) from error
        candidates = find_checkpoints(self.output, config.resume)
        check_trackers(config.trackers)
        check_deepspeed(config)
        if config.push_to_hub is not None:
            check_repository(config.push_to_hub)
        self.accelerator = start_accelerator(config)
        self.accumulation = accumulation_steps(config, self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        self.reports = Reports(config, self.accelerator)
        if config.model.start_from is not None:
            starting_folder(config.model)
        self._open_data()
        self.module, notes = build_model(config, self.data)
        self.origins = {"images, their order or classes": self.data.digest, "VAE's weights": self.data.vae_fingerprint}
        if self.module.origin is not None:
            self.origins["weights of model.start_from"] = self.module.origin
        self.teacher: FlowMapTeacher | None = None
        if config.loss.kind == "flow_map":
            self.teacher = FlowMapTeacher(self.module, teacher_guidance(config))
        self.export = Export(config, self.vae, self.accelerator.device)
        self.preview_config = self._preview_of(self.module.classes)
        self.batches = GroupBatches.of(
            config, self.data, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes
        )
        self.rate = LearningRate(self._peak_rate(), config.schedule, self.steps_per_epoch)
        if candidates:
            self.say(
                f"the run continues from {candidates[0]}, whose weights replace those described in the next lines"
            )
        self.say(*notes, *self._warnings(), self._describe_data())
        if config.data.cache is not None:
            self.say(f"reading the cache {config.data.cache}, and no images")
        self._start_engine()
        self.watch = Stopwatch(self.accelerator.device)
        self.step = self.skipped = self.bad_in_a_row = 0
        self.stop_request, self.stopping = StopRequest(), False
        self.broken: dict[Path, str] = {}
        if candidates:
            self.broken = resume_from(self.accelerator, candidates, self.load)
            self.say(*(f"warning: {problem}; an older one takes its place" for problem in self.broken.values()))
            self.say(f"continuing from step {self.step} of {self.rate.total_steps}")

    # --- building ---

    def _open_data(self) -> None:
        """The VAE, the images to train on and those held out."""
        config = self.config
        self.vae = load_vae(config.data.vae).eval().requires_grad_(False)
        with self.accelerator.main_process_first():  # the other processes then find the dataset prepared
            self.data = open_data(config.data, self.vae)
        self.data, held_out = held_out_images(self.data, config)
        self.unreadable: Unreadable | None = None
        if isinstance(self.data, ImageData):
            self.vae.to(self.accelerator.device)
            self.unreadable = Unreadable(self.data, self.output)
        self.encode = PixelEncoder(self.vae, config.data.encode_batch_size, config.mixed_precision == "bf16")
        self.validation = (
            None
            if held_out is None
            else Validation(held_out, config, self.accelerator, lambda batch: self.taught(self.encode(batch)))
        )

    def _start_engine(self) -> None:
        """Put model and optimiser where they belong: whole on every process, or split over all of them."""
        sharding = self.config.sharding if self.accelerator.num_processes > 1 else "no"
        self.engine = ENGINES[sharding](self.module, self.config, self.accelerator)
        if self.config.compile != "no":
            for networks in (self.module, self.teacher.pipe) if self.teacher is not None else (self.module,):
                networks.condition_encoder.compile_repeated_blocks(backend=self.config.compile)
                networks.transformer.compile_repeated_blocks(backend=self.config.compile)
        self.ema = WeightAverage(self.module, self.config.ema.decay, self.config.ema.warmup)

    @property
    def groups_per_step(self) -> int:
        """The global batch: groups per optimiser step over all processes."""
        return self.batches.global_batch_size * self.accumulation

    @property
    def steps_per_epoch(self) -> float:
        return self.batches.groups_per_epoch / self.groups_per_step

    def _peak_rate(self) -> float:
        optimizer = self.config.optimizer
        return optimizer.learning_rate * (self.groups_per_step / 256 if optimizer.scale_by_batch else 1)

    def _preview_of(self, classes: list[str]) -> PreviewConfig:
        preview = self.config.preview
        labels = list(range(len(classes)))[:10] if preview.labels is None else preview.labels
        wrong = [label for label in labels if not 0 <= label < len(classes)]
        if preview.every is not None and wrong:
            raise ConfigError(f"preview.labels {wrong} are outside 0..{len(classes) - 1}, the model's classes")
        return dataclasses.replace(preview, labels=labels)

    def _warnings(self) -> Iterator[str]:
        """Lines about settings that are allowed but are rarely what the user wants."""
        yield from without_images(self.data.labels, self.data.classes)
        if isinstance(self.data, ImageData):
            yield from self.data.source.notes
        elif self.accelerator.is_main_process:
            yield from changed_files(self.config.data)
        start = self.config.model.start_from
        if start is not None and Path(start, "vae").is_dir():
            vae = load_vae(f"{start}/vae")
            if module_fingerprint(vae, dict(vae.config)) != self.data.vae_fingerprint:
                yield (
                    f"warning: data.vae {self.config.data.vae} is not the VAE of {start}, whose weights know the "
                    "latents of that one. Unset data.vae to take it, and make the cache anew"
                )
        if note := more_workers_than_cores(self.config.data.workers):
            yield f"warning: {note}"
        if self.config.mixed_precision != "no":
            dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.config.mixed_precision]
            if note := half_precision_note(dtype, self.accelerator.device):
                yield f"warning: {note}: --mixed_precision=no"

    def _describe_data(self) -> str:
        return (
            f"data: {len(self.data)} images of {self.data.num_classes} classes; an epoch is "
            f"{self.batches.groups_per_epoch} groups of {self.batches.group_size} image(s), "
            f"{self.steps_per_epoch:.1f} steps of {self.groups_per_step} groups; {self.rate.total_steps} steps in all "
            f"with learning rate {self.rate.peak:g} after {self.rate.warmup_steps} warm-up steps"
        )

    def say(self, *lines: str) -> None:
        """Print on the main process, without breaking the progress bar."""
        self.reports.say(*lines)

    # --- the loop ---

    def run(self) -> Path:
        """Train to the end of the schedule; returns the folder of the finished pipeline.

        Raises:
            TrainingStopped: after `optimizer.max_bad_steps` bad steps in a row; a checkpoint was saved.
            TrainingInterrupted: after Ctrl-C or SIGTERM; a checkpoint was saved.
        """
        main = self.accelerator.is_main_process
        if main:
            self.output.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.output)
            self.say(*set_aside(self.output, self.step, self.broken))
            text = yaml.safe_dump(to_dict(self.config), sort_keys=False)
            (self.output / "config.yaml").write_text(text, encoding="utf-8")
        self.reports.begin(self.step, validates=self.validation is not None)
        self.engine.model.train()
        first, last = self.step * self.accumulation, self.rate.total_steps * self.accumulation
        loader = batch_loader(self.batches, first, last, self.config.data.workers)
        window = Window(self.groups_per_step * self.batches.group_size, self.watch)
        bar = tqdm(
            total=self.rate.total_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not main,
            mininterval=1,
        )
        with bar, self.stop_request.awaited():
            while self.step < self.rate.total_steps:
                with self.watch.timing("data"):
                    micro_batches = [next(loader) for _ in range(self.accumulation)]
                losses, grad_norm = self.train_step(micro_batches)
                window.add(losses, grad_norm)
                bar.update()
                self._report(window, bar)
                self._save_when_due()
                self._stop_if_wanted()
        final = self._finish()
        self.end()
        return final

    def end(self) -> None:
        """Close the trackers and take the process group down, at the very end; `run` does it itself."""
        self.engine.close()
        self.accelerator.end_training()

    def train_step(self, micro_batches: list[dict[str, torch.Tensor]]) -> tuple[torch.Tensor, float]:
        """One optimiser step; returns the losses `(N,)` averaged over the global batch, on the CPU, and the gradient
        norm. The program waits for the device once, in `Engine.step`.
        """
        self.engine.set_learning_rate(self.rate.at(self.step))
        key = keyed_generator(self.config.seed, self.step, self.accelerator.process_index, -1)
        torch.manual_seed(key.initial_seed())  # dropout
        total = torch.zeros((), device=self.accelerator.device)
        for batch in micro_batches:
            with self.watch.timing("encoding"):
                batch = self.to_latents(batch)
            with self.watch.timing("passes"):
                batch = self.taught(batch)
            with self.engine.accumulating(), self.watch.timing("passes"):
                with self.accelerator.autocast():
                    losses = self.engine.model(**batch)
                self.engine.backward(losses.mean())
                total = total + losses.detach() / len(micro_batches)
        # One reduction tells every process the losses and whether any process was asked to stop, so that all of them
        # stop after the same step.
        wanted = total.new_full((1,), float(self.stop_request.made))
        step = self.engine.step(beside=self.accelerator.reduce(torch.cat([total, wanted]), reduction="mean"))
        losses, self.stopping = torch.tensor(step.beside[:-1]), step.beside[-1] > 0
        self._count(step, losses)
        return losses, step.grad_norm

    def to_latents(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device, its images encoded."""
        if self.unreadable is not None:
            self.unreadable.note(batch)
        device = self.accelerator.device
        return self.encode({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})

    def taught(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of a flow map, what its teacher makes of a batch; else the batch as it is."""
        if self.teacher is None:
            return batch
        with self.accelerator.autocast():
            return self.teacher(batch)

    def _count(self, step: Step, losses: torch.Tensor) -> None:
        """Update the EMA after an optimiser step; count the steps, and those that were bad."""
        if step.stepped:
            self.ema.update()
        self.step += 1
        good = step.good and bool(losses.isfinite().all())
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

    def _stop_if_wanted(self) -> None:
        """Save and raise TrainingInterrupted, if a process was asked to stop and there are steps left."""
        if not self.stopping or self.step == self.rate.total_steps:
            return
        # Even if this step was saved just now: what one process sees on its disk, another one may not.
        saved = self.save()
        self.end()
        raise TrainingInterrupted(f"interrupted; step {self.step} is saved in {saved}. Run the command again to go on")

    def _report(self, window: Window, bar: tqdm) -> None:
        if self.step % self.config.log_every and self.step != self.rate.total_steps:
            return
        values = window.summary()
        values |= {"learning_rate": self.rate.at(self.step - 1), "epoch": self.step / self.steps_per_epoch}
        self.reports.training(self.step, values, self.skipped)
        bar.set_postfix(
            loss=f"{values['loss']:.4f}",
            lr=f"{values['learning_rate']:.2g}",
            img_s=f"{values['images_per_second']:.0f}",
        )

    # --- checkpoints ---

    def _save_when_due(self) -> None:
        """Preview, validation and checkpoint, where this step is one of theirs."""
        last = self.step == self.rate.total_steps
        preview, validation = self.preview_config, self.validation
        if preview.every is not None and (last or self.step % preview.every == 0):
            self.reports.preview(self.step, preview, self.engine, self.ema, self.export)
        if validation is not None and (last or self.step % self.config.validation.every == 0):
            self.reports.validate(self.step, validation, self.module, self.ema)
        if last or self.step % self.config.checkpoints.every == 0:
            try:
                self.save()
            except CheckpointError as error:
                if last:
                    raise
                self.say(f"warning: {error}; training goes on, and earlier checkpoints stay")

    def save(self) -> Path:
        """Write a checkpoint; all processes call this together."""
        progress = {
            "step": self.step,
            "skipped": self.skipped,
            "groups_per_step": self.groups_per_step,
            "origins": self.origins,
            "config": to_dict(self.config),
        }
        keep = self.config.checkpoints.keep
        return save_checkpoint(self.accelerator, self.output, progress, self._save_weights, keep)

    @contextmanager
    def _averaged_networks(self) -> Iterator[TrainingModel]:
        """The whole networks on the main process, averaged inside the `with` block; all processes enter it."""
        with self.ema.applied():
            yield self.engine.whole_networks()

    def _save_weights(self, folder: Path) -> None:
        """All processes gather; then the main one writes, and may fail without leaving the others waiting."""
        main, state = self.accelerator.is_main_process, folder / "state"
        weights, optimizer = self.engine.whole_weights(), self.engine.whole_optimizer()
        with self._averaged_networks() as networks:
            if main:
                self.ema.save(state / EMA_FILE, networks)
                self.export.write(networks, folder)
        if main:
            torch.save(optimizer, state / OPTIMIZER_FILE)
            save_file({name: value.contiguous() for name, value in weights.items()}, state / MODEL_FILE)

    def load(self, checkpoint: Path) -> None:
        """Take in a checkpoint; all processes call this together.

        Raises:
            BrokenCheckpointError: if it cannot be read.
            CheckpointError: if it belongs to a run with other settings.
        """
        progress = read_progress(checkpoint, self.config, self.groups_per_step, self.origins)
        state = checkpoint / "state"
        try:
            weights = load_file(state / MODEL_FILE)
            optimizer = torch.load(state / OPTIMIZER_FILE, map_location="cpu", mmap=True, weights_only=True)
            load_process_state(self.accelerator, state)
            self.ema.load(state / EMA_FILE, self.engine.part_of)
            self.engine.load(weights, optimizer)
        except READ_ERRORS as error:
            raise BrokenCheckpointError(f"{checkpoint} cannot be read ({error})") from error
        self.step, self.skipped = progress["step"], progress["skipped"]

    def _finish(self) -> Path:
        """Put the averaged weights at OUTPUT/pipeline, or OUTPUT/lora."""
        final = self.output / self.export.name
        with self._averaged_networks() as networks:
            if self.reports.metrics is not None:
                self.reports.plot()
                self.export.write_final(networks, self._describe_data(), self.reports.metrics.read())
        self.accelerator.wait_for_everyone()
        if self.unreadable is not None:
            self.say(*self.unreadable.summary())
        self.say(f"finished: {final}")
        if self.config.push_to_hub is not None and self.accelerator.is_main_process:
            self.say(f"pushed to {publish(final, self.config.push_to_hub)}")
        return final
