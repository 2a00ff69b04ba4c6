"""A training step, ours beside the released code's, with the same weights; and ways to compute MRAR's losses.

    python -m benchmarks.training --reference ../TransDiff --models transdiff_b transdiff_b_mrar --output training

A step is forward, backward, clipping, AdamW and EMA, with the published dropout. `--metrics` adds what a finished run
wrote about its speed.
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from training.data.batches import logit_normal_timesteps
from training.dry_run import CPU_ATTENTION
from training.model.build import TrainingModel
from training.model.ema import WeightAverage, local
from training.model.loss import tile
from training.model.optimizer import build_optimizer
from training.outputs.metrics import Stopwatch
from training.settings.config import OptimizerConfig
from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path
from transdiff_pipelines.latents import NUM_TRAIN_TIMESTEPS, noise_latents
from transdiff_pipelines.loaders.original_checkpoint import load_original_components
from transdiff_pipelines.presets import PublishedModel, published_model

from .common.machine import DTYPES, CallClock, PeakMemory, describe
from .common.peers import random_components
from .common.reference import ReleasedModel
from .common.report import command_line, markdown_table, significant, write_json, write_text


DIFFUSION_BATCH_MUL = {1: 4, 4: 2}
"""Timesteps for each latent, by the images of a sequence, as published."""

Losses = Callable[..., Tensor]


class Draws:
    """The random numbers of one step: B groups of N images, m timesteps and noises for each latent."""

    def __init__(self, model: PublishedModel, batch_size: int, device: torch.device, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        images, side = model.num_images, model.latent_size
        rows = batch_size * DIFFUSION_BATCH_MUL[images]
        self.latents = torch.randn(batch_size, images, 16, side, side, generator=generator).to(device)
        self.labels = torch.randint(model.num_classes, (batch_size,), generator=generator).to(device)
        self.normal = torch.randn(images, rows, generator=generator)
        self.noise = torch.randn(images, rows, 16, side, side, generator=generator).to(device)

    def batch(self) -> dict[str, Tensor]:
        """The arguments of `TrainingModel`."""
        timesteps = logit_normal_timesteps(self.normal).to(self.noise.device)
        return {"latents": self.latents, "labels": self.labels, "timesteps": timesteps, "noise": self.noise}


@dataclass(frozen=True)
class StepSetting:
    """How steps are made: float32, or bfloat16 under autocast; `optimizer` is AdamW's kind, see `OptimizerConfig`.

    `compiled` lists whether blocks are compiled, "off", "on" or both.
    """

    model: PublishedModel
    batch_size: int
    device: torch.device
    dtype: torch.dtype = torch.float32
    optimizer: Literal["fused", "adamw"] = "fused"
    compiled: tuple[str, ...] = ("off",)


class Step:
    """What is timed: a call with the draws of a step. `watch` has the seconds of the last one's passes.

    Attributes:
        module: the network that is trained; `network`: its decoder; `averages`: its EMA.
    """

    module: Any
    network: nn.Module
    optimizer: Any
    averages: Sequence[Tensor]
    watch: Stopwatch

    def __call__(self, draws: Draws) -> None:
        raise NotImplementedError

    def state_bytes(self) -> int:
        """Bytes of weights, optimiser and EMA."""
        moments = [value for row in self.optimizer.state.values() for value in row.values()]
        kept = [*self.module.parameters(), *moments, *self.averages]
        return sum(local(value).nbytes for value in kept if isinstance(value, Tensor))


class OurStep(Step):
    """Our training step on a module, with the optimiser and the EMA that the training loop builds."""

    def __init__(self, module: TrainingModel, setting: StepSetting, compiled: bool = False):
        self.module, self.network = module.train(), module.transformer
        self.config = OptimizerConfig(kind=setting.optimizer)
        self.optimizer = build_optimizer(module, self.config)
        self.average = WeightAverage(module, decay=0.9999)
        self.averages = self.average.average.shadow_params
        self.watch, self.half = Stopwatch(setting.device), setting.dtype == torch.bfloat16
        for network in (module.condition_encoder, module.transformer) if compiled else ():
            network.compile_repeated_blocks()

    def __call__(self, draws: Draws) -> None:
        self.watch.clear()
        batch = draws.batch() | {"noise": torch.randn_like(draws.noise)}  # drawn in the step, as theirs is
        with self.watch.timing("passes"):
            with torch.autocast(self.watch.device.type, torch.bfloat16, enabled=self.half):
                losses = self.module(**batch)
            losses.mean().backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()


class ReleasedStep(Step):
    """The released code's step: its loss, and around it what its engine does, with the same settings."""

    def __init__(self, model: ReleasedModel):
        self.model, self.module, self.network = model, model.module, model.network
        self.watch = Stopwatch(model.device)
        model.module.train()
        self.config = config = OptimizerConfig()
        self.parameters = list(model.module.parameters())
        betas = (config.beta1, config.beta2)
        self.optimizer = torch.optim.AdamW(self.parameters, config.learning_rate, betas, weight_decay=0.0)
        self.averages = [value.detach().clone() for value in self.parameters]

    def __call__(self, draws: Draws) -> None:
        self.watch.clear()
        with self.watch.timing("passes"):
            self.model.loss(draws.latents, draws.labels).backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, value in zip(
                self.averages, self.parameters, strict=True
            ):  # one by one, as the released code does
                average.mul_(0.9999).add_(value, alpha=1e-4)


def tiled_losses(
    encoder: ARConditionEncoder,
    transformer: TransDiffTransformer2DModel,
    latents: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """`prefix_losses` the plain way: the tiled condition, projected for each image and each timestep anew."""
    batch, num_images = latents.shape[:2]
    times = timesteps.shape[1] // batch
    condition = tile(encoder(labels, latents[:, :-1] if num_images > 1 else None).condition, times)
    losses = []
    for image in range(num_images):
        noisy, target = noisy_and_target(latents[:, image], timesteps[image], noise[image])
        prefix = condition[:, : (image + 1) * condition.shape[1] // num_images]
        losses.append(F.mse_loss(transformer(noisy, timesteps[image], prefix).sample, target))
    return torch.stack(losses)


def packed_losses(
    encoder: ARConditionEncoder,
    transformer: TransDiffTransformer2DModel,
    latents: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """One decoder batch for all images of a sequence, with the whole condition and without the mask that would hide
    the later part: not the loss, but no packed batch that computes it can take less time.
    """
    references = latents[:, :-1] if latents.shape[1] > 1 else None
    projected = transformer.project_condition(encoder(labels, references).condition)
    noisy, target = noisy_and_target(
        latents.transpose(0, 1).flatten(0, 1), timesteps.flatten(), noise.flatten(0, 1), timesteps.shape[0]
    )
    velocity = transformer(noisy, timesteps.flatten(), projected).sample
    return (velocity - target).square().flatten(1).mean(1).view(timesteps.shape).mean(1)


def noisy_and_target(clean: Tensor, timesteps: Tensor, noise: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """Noisy latents and velocities of `groups` batches of clean latents, each tiled as its timesteps ask."""
    times = len(timesteps) // len(clean)
    clean = torch.cat([tile(part, times) for part in clean.chunk(groups)])
    sigma = (timesteps / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
    return noise_latents(clean, noise, sigma), noise - clean


def same_weights(checkout: Path, setting: StepSetting) -> tuple[TrainingModel, ReleasedModel]:
    """Ours and the released model with the same random weights, in evaluation mode, through our converter."""
    torch.manual_seed(0)
    model, device = setting.model, setting.device
    released = ReleasedModel(checkout, model, device, setting.dtype)
    released.randomize(seed=0)
    released.module.diffusion_batch_mul = DIFFUSION_BATCH_MUL[model.num_images]
    with tempfile.TemporaryDirectory(prefix="transdiff-benchmark-") as folder:
        path = Path(folder, "checkpoint-last.pth")
        released.save(path)
        parts = load_original_components(path, AutoencoderKL(), model.size.num_attention_heads)
    return training_model(parts["condition_encoder"], parts["transformer"], model).to(device), released


def training_model(
    encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel, model: PublishedModel
) -> TrainingModel:
    """As the training loop has it: the projection that nothing reads in a 1-step model is frozen."""
    module = TrainingModel(encoder, transformer, [str(number) for number in range(model.num_classes)])
    module.condition_encoder.reference_projection.requires_grad_(model.num_images > 1)
    return module.eval()


@torch.no_grad()
def loss_difference(ours: TrainingModel, released: ReleasedModel, draws: Draws) -> dict[str, float]:
    """Both losses with the same draws and without dropout."""
    with torch.autocast(released.device.type, torch.bfloat16, enabled=released.dtype == torch.bfloat16):
        loss = float(ours(**draws.batch()).mean())
    theirs = float(released.loss_with_draws(draws.latents, draws.labels, draws.normal, draws.noise))
    return {"ours": loss, "released": theirs, "relative_difference": abs(loss - theirs) / abs(theirs)}


def count(call: Callable[[], Any]) -> int:
    """FLOPs of a call with its backward pass; compiled modules run as they are written."""
    stance = torch.compiler.set_stance("force_eager")
    with stance, FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        call()
    return counter.get_total_flops()


def take_turns(
    calls: Mapping[str, Callable[[], Any]], networks: Mapping[str, nn.Module], rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds and FLOPs of each call: a round that is counted, one more for memory to settle, then rounds in turns."""
    results: dict[str, dict[str, Any]] = {
        name: {"flops": count(call), "seconds": [], "cpu_seconds": []} for name, call in calls.items()
    }
    for number in range(-1, rounds):
        for name in sorted(calls, reverse=number % 2 == 1):
            clock = CallClock(next(networks[name].parameters()).device, networks[name])
            clock.time(calls[name])
            if number < 0:
                continue
            results[name]["seconds"].append(clock.total)
            results[name]["cpu_seconds"].append(clock.cpu)
    return results


def compare(results: dict[str, dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """A row for each call: medians, and the others over ours pair by pair (more than 1: ours is faster)."""
    rows = []
    for name, result in results.items():
        row: dict[str, Any] = {"name": name, **result, "ratio_flops": result["flops"] / results[ours]["flops"]}
        for measure in ("seconds", "cpu_seconds"):
            pairs = zip(result[measure], results[ours][measure], strict=True)
            ratios = [theirs / mine for theirs, mine in pairs]
            row[f"median_{measure}"] = statistics.median(result[measure])
            row[f"ratio_{measure}"] = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
        rows.append(row)
    return rows


def steps_side_by_side(setting: StepSetting, checkout: Path | None, rounds: int) -> dict[str, Any]:
    """Our step, also with compiled blocks where the setting lists it, and with a checkout the released one."""
    draws = Draws(setting.model, setting.batch_size, setting.device)
    check = released = None
    if checkout is None:
        module = training_model(*random_components(setting.model, device=setting.device), setting.model)
        module.to(setting.device)
    else:
        module, released = same_weights(checkout, setting)
        check = loss_difference(module, released, draws)
        print(f"{setting.model.folder}: loss {check}", flush=True)
    modules = [module, *(copy.deepcopy(module) for _ in setting.compiled[1:])]
    names = ["ours, compiled" if compiled == "on" else "ours" for compiled in setting.compiled]
    steps: dict[str, Step] = {
        name: OurStep(each, setting, compiled == "on")
        for name, each, compiled in zip(names, modules, setting.compiled, strict=True)
    }
    if released is not None:
        steps["released"] = ReleasedStep(released)
    return {"loss": check, "rows": measure_steps(steps, draws, rounds)}


def measure_steps(steps: Mapping[str, Step], draws: Draws, rounds: int) -> list[dict[str, Any]]:
    """A row for each step, the first one's ratios being 1: times, and memory of its state and above that."""
    first, *_ = steps
    calls = {name: partial(step, draws) for name, step in steps.items()}
    results = take_turns(calls, {name: step.network for name, step in steps.items()}, rounds)
    for name, step in steps.items():
        results[name]["outside_fraction"] = 1 - step.watch.seconds()["passes"] / results[name]["seconds"][-1]
        with PeakMemory(step.watch.device) as peak:
            calls[name]()
        results[name] |= {"working_bytes": peak.bytes, "state_bytes": step.state_bytes()}
    return compare(results, first)


def loss_variants(setting: StepSetting, checkout: Path | None, rounds: int) -> dict[str, Any]:
    """Forward and backward of three ways to compute the losses of a sequence, all ours and in float32."""
    model, device = setting.model, setting.device
    encoder, transformer = (part.to(device).train() for part in random_components(model, device=device))
    batch = Draws(model, setting.batch_size, device).batch()
    module = training_model(encoder, transformer, model).train()

    def passes(losses: Losses) -> None:
        losses().mean().backward()
        module.zero_grad()

    variants: dict[str, Losses] = {
        "projected once": lambda: module(**batch),
        "projected for each image and timestep": lambda: tiled_losses(encoder, transformer, **batch),
        "one packed batch (bound)": lambda: packed_losses(encoder, transformer, **batch),
    }
    calls = {name: partial(passes, losses) for name, losses in variants.items()}
    results = take_turns(calls, dict.fromkeys(calls, transformer), rounds)
    return {"loss": None, "rows": compare(results, "projected once")}


def run_speed(path: Path) -> dict[str, float]:
    """Medians over a run's metrics.jsonl: images a second, and the shares spent outside the passes and on data."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    names = ("images_per_second", "outside_fraction", "data_fraction")
    return {name: statistics.median(line[name] for line in lines) for name in names} | {"lines": len(lines)}


def markdown(result: dict[str, Any]) -> str:
    """The tables of a run with what it takes to understand them."""
    machine = result["machine"]
    header = [
        "model", "step", "images", "s (median)", "processor s", "images a processor second", "TFLOP",
        "over ours: time", "processor time", "FLOPs",
    ]  # fmt: skip
    rows = []
    for setting in result["settings"]:
        for row in setting["rows"]:
            rows.append([
                setting["model"], row["name"], setting["images"], significant(row["median_seconds"]),
                significant(row["median_cpu_seconds"]), significant(setting["images"] / row["median_cpu_seconds"]),
                significant(row["flops"] / 1e12), ratio(row["ratio_seconds"]), ratio(row["ratio_cpu_seconds"]),
                f"{row['ratio_flops']:.3f}",
            ])  # fmt: skip
    parts = [
        f"`{result['command']}`",
        f"{machine['processor']}, {machine['threads']} of {machine['cores']} cores, torch {machine['torch']}, "
        f"{machine['date']}; load average at the start {machine['load_average'][0]:.1f}.",
        markdown_table(header, rows),
    ]
    for setting in result["settings"]:
        if setting.get("loss"):
            loss = setting["loss"]
            parts.append(
                f"{setting['model']}, the same weights, noise and timesteps without dropout: loss {loss['ours']:.6f}, "
                f"released {loss['released']:.6f}, relative difference {loss['relative_difference']:.1e}."
            )
    if result["run"]:
        run = result["run"]
        parts.append(
            f"A run's metrics.jsonl, medians of {run['lines']} lines: {run['images_per_second']:.3g} images a second; "
            f"outside the passes {run['outside_fraction']:.1%} of the time, for data {run['data_fraction']:.1%}."
        )
    return "\n\n".join(parts) + "\n"


def ratio(values: dict[str, float]) -> str:
    return f"{values['median']:.3f} ({values['min']:.3f}-{values['max']:.3f})"


def cut(model: PublishedModel, decoder_layers: int | None) -> PublishedModel:
    """The model with fewer decoder blocks, and twice as many in the encoder."""
    layers = decoder_layers or model.size.decoder_layers
    return replace(model, size=replace(model.size, decoder_layers=layers, encoder_layers=2 * layers))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["transdiff_b", "transdiff_b_mrar"])
    parser.add_argument("--parts", nargs="+", choices=["steps", "losses"], default=["steps", "losses"])
    parser.add_argument("--reference", type=home_path, help="checkout of the released code, to compare with")
    parser.add_argument("--decoder-layers", type=int, help="fewer blocks than it has; the encoder has twice as many")
    parser.add_argument("--batch-size", type=int, default=2, help="groups a step; a 1-step group is one image")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16: autocast")
    parser.add_argument("--optimizer", choices=["fused", "adamw"], default="fused", help="kind of AdamW, ours")
    parser.add_argument("--compile", nargs="+", choices=["off", "on"], default=["off"], help="our blocks")
    parser.add_argument("--metrics", type=home_path, help="metrics.jsonl of a run, whose speed is reported too")
    parser.add_argument("--device", default=str(best_device()))
    parser.add_argument("--threads", type=int, help="processor threads; all by default")
    parser.add_argument("--output", type=home_path, required=True, help="results go to OUTPUT.json and .md")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {
        "command": command_line("benchmarks.training"),
        "machine": describe(torch.device(options.device)),
        "run": run_speed(options.metrics) if options.metrics else None,
        "settings": [],
    }
    measures = {"steps": steps_side_by_side, "losses": loss_variants}
    for name, part in itertools.product(options.models, options.parts):
        model = cut(published_model(name), options.decoder_layers)
        images = options.batch_size * model.num_images
        shown = f"{name}, {model.size.decoder_layers} decoder blocks"
        setting = StepSetting(
            model,
            options.batch_size,
            torch.device(options.device),
            DTYPES[options.dtype],
            options.optimizer,
            tuple(dict.fromkeys(options.compile)),
        )
        measured = measures[part](setting, options.reference, options.rounds)
        result["settings"].append({"model": shown, "part": part, "images": images, **measured})
        write_json(options.output.with_suffix(".json"), result)
        write_text(options.output.with_suffix(".md"), markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
