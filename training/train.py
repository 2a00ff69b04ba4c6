"""The training loop, for 1-step and MRAR models alike: `accelerate launch -m training.train --config FILE`.

latents or images -> batches -> loss -> AdamW -> EMA -> checkpoints, and a pipeline folder at the end. Everything
random is keyed: a batch on its position in the data (see `data.batches`), dropout on (seed, step, process). Together
with the learning rate, a function of the step, this makes the step number the only position there is, and resuming
exact.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from training.data.batches import GroupBatches, batch_loader, keyed_generator
from training.data.image_dataset import ImageData, Unreadable, open_data
from training.data.latent_cache import CacheError
from training.data.vae import PixelEncoder, frozen_fingerprint, load_vae, module_fingerprint
from training.distributed.interruption import StopRequest, TrainingInterrupted, TrainingStopped
from training.distributed.processes import start_accelerator
from training.distributed.sharding import (
    empty_copy,
    gather,
    keep_optimizer_files_whole,
    local,
    shard,
    sliced_like,
    whole,
)
from training.distributed.zero import ZeroEngine, check_deepspeed
from training.model.build import TrainingModel, build_model, build_optimizer, build_pipeline, sampling_settings
from training.model.ema import WeightAverage
from training.model.lora import save_adapters
from training.model.schedule import LearningRate
from training.outputs.card import write_card
from training.outputs.checkpoints import (
    READ_ERRORS,
    BrokenCheckpointError,
    CheckpointError,
    find_checkpoints,
    read_progress,
    remove_leftovers,
    resume_from,
    save_checkpoint,
    set_aside,
)
from training.outputs.metrics import MetricsLog, Stopwatch, Window, save_preview
from training.outputs.publish import PublishError, check_repository, publish
from training.outputs.trackers import check_trackers, log_image, start_trackers
from training.outputs.validation import Validation, held_out_images
from training.settings.config import (
    ConfigError,
    PreviewConfig,
    TrainConfig,
    accumulation_steps,
    config_or_exit,
    to_dict,
)
from transdiff_pipelines.half_precision import half_precision_note

from .dry_run import describe


MODEL_FILE, EMA_FILE, OPTIMIZER_FILE = "model.safetensors", "ema.safetensors", "optimizer.bin"


class Trainer:
    """One run: builds everything from a configuration, then `run()` trains to the end of the schedule."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.output = Path(config.output)
        candidates = find_checkpoints(self.output, config.resume)
        check_trackers(config.trackers)
        check_deepspeed(config)
        if config.push_to_hub is not None:
            check_repository(config.push_to_hub)
        self.accelerator = start_accelerator(config)
        self.accumulation = accumulation_steps(config, self.accelerator.num_processes)
        self.accelerator.gradient_accumulation_steps = self.accumulation
        self.vae = load_vae(config.data.vae).eval().requires_grad_(False)
        with self.accelerator.main_process_first():  # the others find a dataset prepared
            self.data = open_data(config.data, self.vae)
        self.data, held_out = held_out_images(self.data, config)
        self.unreadable: Unreadable | None = None
        if isinstance(self.data, ImageData):
            self.vae.to(self.accelerator.device)
            self.unreadable = Unreadable(self.data, self.output)
        self.encode = PixelEncoder(self.vae, config.data.encode_batch_size, config.mixed_precision == "bf16")
        self.validation = None if held_out is None else Validation(held_out, config, self.accelerator, self.encode)
        module, notes = build_model(config, self.data)
        self.origins = {"images, their order or classes": self.data.digest, "VAE's weights": self.data.vae_fingerprint}
        if config.lora.rank is not None:  # a checkpoint has the adapters alone
            self.origins["weights of model.start_from"] = frozen_fingerprint(module)
        self.sampling = sampling_settings(config)
        self.preview_config = self._preview_of(module.classes)
        self.batches = GroupBatches.of(
            config, self.data, rank=self.accelerator.process_index, world_size=self.accelerator.num_processes
        )
        self.rate = LearningRate(self._peak_rate(), config.schedule, self.steps_per_epoch)
        if candidates:
            self.say(f"{candidates[0]} is there: its weights will take the place of those told of here")
        self.say(*notes, *self._warnings(), self._describe_data())
        if config.data.cache is not None:
            self.say(f"reading the cache {config.data.cache}, and no images")

        self._prepare(module)
        if config.compile != "no":
            for network in (self.module.condition_encoder, self.module.transformer):
                network.compile_repeated_blocks(backend=config.compile)
        self.ema = WeightAverage(self.module, config.ema.decay, config.ema.warmup)
        # accelerate's own file would have names that depend on the number of processes
        self.accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        self.accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())
        self.watch = Stopwatch(self.accelerator.device)
        self.step = self.skipped = self.bad_in_a_row = 0
        self.stop_request, self.stopping = StopRequest(), False
        self.validations: MetricsLog | None = None
        self.broken: dict[Path, str] = {}
        if candidates:
            self.broken = resume_from(self.accelerator, candidates, self._load)
            self.say(*(f"warning: {problem}; an older one takes its place" for problem in self.broken.values()))
            self.say(f"continuing from step {self.step} of {self.rate.total_steps}")

    # --- building ---

    def _prepare(self, module: TrainingModel) -> None:
        """Put model and optimiser where they belong: whole on every process, or split over all of them.

        `empty` is a copy without numbers of a model that is split, to be filled where it is needed whole; `zero` is
        DeepSpeed, if it splits the optimiser.
        """
        self.model: Any
        self.optimizer: Any
        self.module = module
        self.empty: TrainingModel | None = None
        self.zero: ZeroEngine | None = None
        sharding = self.config.sharding if self.accelerator.num_processes > 1 else "no"
        if sharding == "zero2":
            optimizer = build_optimizer(module, self.config.optimizer)
            self.zero = ZeroEngine(module, optimizer, self.config, self.accelerator.device)
            self.model = self.optimizer = self.zero
        elif sharding == "fsdp2":
            self.empty = empty_copy(module)
            shard(module, self.accelerator.device, self.accelerator.num_processes)
            optimizer = build_optimizer(module, self.config.optimizer)
            keep_optimizer_files_whole(optimizer)
            self.model = module
            self.optimizer = self.accelerator.prepare(optimizer)
        else:
            optimizer = build_optimizer(module, self.config.optimizer)
            self.model, self.optimizer = self.accelerator.prepare(module, optimizer)

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
        """What is allowed, and rarely meant."""
        start = self.config.model.start_from
        if start is not None and Path(start, "vae").is_dir():
            vae = load_vae(f"{start}/vae")
            if module_fingerprint(vae, dict(vae.config)) != self.data.vae_fingerprint:
                yield (
                    f"warning: data.vae {self.config.data.vae} is not the VAE of {start}, whose weights know the "
                    "latents of that one. Unset data.vae to take it, and make the cache anew"
                )
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
        if self.accelerator.is_main_process:
            for line in lines:
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

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
            self.metrics = MetricsLog(self.output, self.step)
            if self.validation is not None:
                self.validations = MetricsLog(self.output, self.step, "validation.jsonl")
        start_trackers(self.accelerator, self.config)
        self.model.train()
        first, last = self.step * self.accumulation, self.rate.total_steps * self.accumulation
        loader = iter(batch_loader(self.batches, first, last, self.config.data.workers))
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
            with self.watch.timing("encoding"):
                batch = self.to_latents(batch)
            with self.accelerator.accumulate(self.model), self.watch.timing("passes"):
                with self.accelerator.autocast():
                    losses = self.model(**batch)
                self._backward(losses.mean())
                total = total + losses.detach() / len(micro_batches)
                if self.accelerator.sync_gradients:
                    grad_norm = self._clip_or_step()
        wanted = total.new_full((1,), float(self.stop_request.made))
        reduced = self.accelerator.reduce(torch.cat([total, wanted]), reduction="mean")
        losses, self.stopping = reduced[:-1], bool(reduced[-1])  # what one process was asked all hear of in one step
        self._update(losses, float(grad_norm))
        return losses, float(grad_norm)

    def to_latents(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch on the device, its images encoded."""
        if self.unreadable is not None:
            self.unreadable.note(batch)
        device = self.accelerator.device
        return self.encode({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})

    def _backward(self, loss: torch.Tensor) -> None:
        if self.zero is not None:
            self.zero.backward(loss / self.accumulation, last=self.accelerator.sync_gradients)
        else:
            self.accelerator.backward(loss)

    def _clip_or_step(self) -> torch.Tensor:
        """Clip the gradients and return their norm before; DeepSpeed also steps, in the same call."""
        if self.zero is not None:
            return self.zero.step()
        return whole(self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.optimizer.max_grad_norm))

    def _update(self, losses: torch.Tensor, grad_norm: float) -> None:
        """Step the optimiser and the EMA, unless the loss or the gradient is not finite.

        DeepSpeed has stepped by now, or skipped the step for the same reason. Under fp16 an overflowing gradient is
        normal: the scaler skips that step itself and lowers its scale. Only when the scale has fallen below 1 does an
        overflow count as a bad step.
        """
        scaler = self.accelerator.scaler
        judged_by_scaler = scaler is not None and scaler.get_scale() >= 1
        good = bool(losses.isfinite().all()) and (judged_by_scaler or math.isfinite(grad_norm))
        if self.zero is None and (good or scaler is not None):
            self.optimizer.step()
        # fused AdamW leaves the weights alone as the scaler tells it, without being skipped itself
        if good and math.isfinite(grad_norm) and not self.accelerator.optimizer_step_was_skipped:
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

    def _stop_if_wanted(self) -> None:
        """Save and raise TrainingInterrupted, if a process was asked to stop and there are steps left."""
        if not self.stopping or self.step == self.rate.total_steps:
            return
        saved = self.save()  # again if it was due: processes must not decide by what each sees on a disk
        self.accelerator.end_training()
        raise TrainingInterrupted(f"interrupted; step {self.step} is saved in {saved}. Run the command again to go on")

    # --- reports, checkpoints ---

    def _report(self, window: Window, bar: tqdm) -> None:
        if self.step % self.config.log_every and self.step != self.rate.total_steps:
            return
        values = window.summary()
        values |= {"learning_rate": self.rate.at(self.step - 1), "epoch": self.step / self.steps_per_epoch}
        if self.accelerator.is_main_process:
            with self._warned("metrics.jsonl"):
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
        if self.validation is not None and (last or self.step % self.config.validation.every == 0):
            self.validate(self.validation)
        if last or self.step % self.config.checkpoints.every == 0:
            try:
                self.save()
            except CheckpointError as error:
                if last:
                    raise
                self.say(f"warning: {error}; training goes on, and earlier checkpoints stay")

    @contextmanager
    def _warned(self, name: str) -> Iterator[None]:
        """A report that cannot be written, on a full disk for instance, does not end the run."""
        try:
            yield
        except OSError as error:
            self.say(f"warning: step {self.step}: {name} cannot be written ({error})")

    def preview(self) -> None:
        """previews/step-N.png from the averaged weights, step-N-raw.png from the raw ones, and loss.png."""
        self._save_preview("raw", "-raw")
        with self.ema.applied():
            self._save_preview("ema", "")
        if self.accelerator.is_main_process:
            with self._warned("loss.png"):
                self.metrics.plot(self.validations)
        self.accelerator.wait_for_everyone()

    def _save_preview(self, weights: str, suffix: str) -> None:
        path = self.output / "previews" / f"step-{self.step:08d}{suffix}.png"
        networks = self.whole_networks()
        if not self.accelerator.is_main_process:
            return
        training = networks.training
        networks.eval()
        with self._warned(path.name):
            grid = save_preview(self.pipeline(networks), self.preview_config, self.config.seed, path)
            log_image(self.accelerator, f"samples_{weights}", grid, self.step)
        networks.train(training)

    def validate(self, validation: Validation) -> None:
        """The loss on held-out images, of raw and of averaged weights: into validation.jsonl and the trackers."""
        values = {"validation_loss_raw": validation.loss(self.module)}
        with self.ema.applied():
            values["validation_loss_ema"] = validation.loss(self.module)
        if self.validations is not None:
            with self._warned("validation.jsonl"):
                self.validations.write({"step": self.step, **values})
        self.accelerator.log(values, step=self.step)
        self.say(f"step {self.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in values.items()))

    def whole_networks(self, averaged: bool = False) -> TrainingModel:
        """The networks themselves, or, of split weights, a copy with all of them on the main process, raw or averaged;
        on the others it has no numbers. All processes call this together.
        """
        if self.empty is None:
            return self.module
        with self.ema.applied() if averaged else nullcontext():
            state = gather(self.module.state_dict(), keep=self.accelerator.is_main_process)
        if not state:
            return self.empty
        networks = copy.deepcopy(self.empty)
        networks.load_state_dict(state, assign=True)
        return networks.to(self.accelerator.device)

    def pipeline(self, networks: TrainingModel) -> Any:
        """The pipeline around whole networks."""
        self.vae.to(self.accelerator.device)
        return build_pipeline(networks, self.vae, self.sampling, networks.classes)

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

    def _save_weights(self, folder: Path) -> None:
        """All processes gather; then the main one writes, and may fail without leaving the others waiting."""
        main = self.accelerator.is_main_process
        raw, averaged = gather(self._raw_weights(), keep=main), gather(self.ema.tensors(), keep=main)
        networks = self.whole_networks(averaged=True)
        optimizer = None if self.zero is None else self.zero.state_dict(keep=main)
        if main:
            if optimizer is not None:
                torch.save(optimizer, folder / "state" / OPTIMIZER_FILE)
            save_file({name: value.contiguous() for name, value in raw.items()}, folder / "state" / MODEL_FILE)
            self.ema.save(folder / "state" / EMA_FILE, averaged)
            self._export(networks, folder)

    def _raw_weights(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps of the weights: all, or with LoRA the adapters alone."""
        state = self.module.state_dict()
        return state if self.config.lora.rank is None else {name: state[name] for name in self.ema.names}

    def _export(self, networks: TrainingModel, folder: Path) -> Path:
        """The averaged weights for users: `folder`/pipeline, or with LoRA `folder`/lora; returns which."""
        with self.ema.applied():
            if self.config.lora.rank is None:
                self.pipeline(networks).save_pretrained(folder / "pipeline")
                return folder / "pipeline"
            save_adapters(networks, folder / "lora")
            return folder / "lora"

    def _load(self, checkpoint: Path) -> None:
        progress = read_progress(checkpoint, self.config, self.groups_per_step, self.origins)
        try:
            raw = load_file(checkpoint / "state" / MODEL_FILE)
            self.accelerator.load_state(str(checkpoint / "state"))
            self.ema.load(checkpoint / "state" / EMA_FILE)
            for name, value in self._raw_weights().items():
                local(value).copy_(local(sliced_like(raw[name], value)))
            if self.zero is not None:
                file = checkpoint / "state" / OPTIMIZER_FILE
                self.zero.load_state_dict(torch.load(file, map_location="cpu", mmap=True, weights_only=True))
        except READ_ERRORS as error:
            raise BrokenCheckpointError(f"{checkpoint} cannot be read ({error})") from error
        self.step, self.skipped = progress["step"], progress["skipped"]
        self.accelerator.step = 0  # of the micro-batches of a step: load_state brings that of another accumulation

    def _finish(self) -> Path:
        """Put the averaged weights at OUTPUT/pipeline, or OUTPUT/lora, replacing an older one as a whole."""
        final = self.output / ("pipeline" if self.config.lora.rank is None else "lora")
        networks = self.whole_networks(averaged=True)
        if self.accelerator.is_main_process:
            self._write_final(networks, final)
        self.accelerator.wait_for_everyone()
        if self.unreadable is not None:
            self.say(*self.unreadable.summary())
        self.say(f"finished: {final}")
        if self.config.push_to_hub is not None and self.accelerator.is_main_process:
            self.say(f"pushed to {publish(final, self.config.push_to_hub)}")
        return final

    def _write_final(self, networks: TrainingModel, final: Path) -> None:
        partial = self.output / ".final.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.metrics.plot(self.validations)
        exported = self._export(networks, partial)
        write_card(exported, self.pipeline(networks), self.config, self._describe_data(), self.metrics.read())
        shutil.rmtree(final, ignore_errors=True)
        exported.rename(final)
        partial.rmdir()


def main() -> None:
    """Train, or with `--dry-run` say what would be trained and stop."""
    dry_run = "--dry-run" in sys.argv[1:]
    config = config_or_exit("training.train", [argument for argument in sys.argv[1:] if argument != "--dry-run"])
    try:
        trainer = Trainer(config)
        if dry_run:
            trainer.say(describe(trainer))
        else:
            trainer.run()
    except (ConfigError, CacheError, CheckpointError, TrainingStopped, PublishError) as error:
        print(f"training.train: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        print(f"training.train: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
