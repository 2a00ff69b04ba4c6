"""Few-step sampling: the order of each sampler on known flows, and quality against model calls on the digits model.

    python -m benchmarks.few_steps --parts flows --output few_steps
    python -m benchmarks.few_steps --parts digits --data datasets/digits --output few_steps --keep images

writes `few_steps_flows.{json,md,png}` and `few_steps_digits.{json,md,png}`. Quality is the Fréchet distance (the
formula of the FID) on 64 pixels, the means of 4x4 blocks of the 32x32 image, to the training split: what the model
learned, as the FID is commonly taken. All settings start from the same noise and labels, and the ratio to
100-step Euler-Maruyama has a bootstrap interval over these pairs. With `--student FOLDER` a flow map of the model is
measured beside it.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from training.data.vae import tensors_digest
from training.digits.quality import balanced_labels, fit_recogniser, load_pixels, pooled_pixels, recognition
from training.evaluation.quality import BATCH_SIZE, frechet_distance, generate, within_class_variance
from transdiff_pipelines import DIGITS, FlowMatchEulerMaruyamaScheduler, TransDiffPipeline
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path, new_file
from transdiff_pipelines.generation import without_loading_bars

from .common.known_flows import fitted_order, gaussian_errors, mixture_error, model_calls
from .common.machine import describe
from .common.report import command_line, markdown_table, plt, save_figure, write_json, write_text
from .common.samplers import EULER_MARUYAMA, FIXED_GRID, FLOW_MAPS, Sampler, time_grids


FLOW_CALLS = (5, 8, 10, 15, 20, 40, 80, 160, 320)
FITTED_FROM = 40  # model calls; with fewer, errors do not yet fall as the order of the sampler says
MIXTURE_CALLS = (5, 8, 10, 15, 20, 40, 100)
DIGITS_CALLS = (5, 8, 10, 15, 20)
STUDENT_CALLS = (1, 2, 3, 4)
REFERENCE_CALLS = 100
BOUND = 1.05  # of the ratio: fewer calls with an interval below it are taken to be no worse
BOOTSTRAP_SEED = 0
SEED_STRIDE = 1000  # the first batch of --seed S has the seed 1000 S


def flows(mixture_samples: int) -> list[dict[str, Any]]:
    """Errors of every sampler on the known flows; for the SDE at unit scales."""
    config = FlowMatchEulerMaruyamaScheduler().config
    rows = []
    for sampler in FIXED_GRID:
        gaussian = []
        for calls in FLOW_CALLS:
            scheduler, steps = sampler.make(config), sampler.steps_within(calls)
            before_last, at_data = gaussian_errors(scheduler, steps)
            gaussian.append({"calls": model_calls(scheduler, steps), "integration": before_last, "data": at_data})
        mixture = [
            {
                "calls": calls,
                "error": mixture_error(sampler.make(config), sampler.steps_within(calls), mixture_samples),
            }
            for calls in MIXTURE_CALLS
        ]
        fitted = [point for point in gaussian if point["calls"] >= FITTED_FROM]
        order = fitted_order([int(point["calls"]) for point in fitted], [point["integration"] for point in fitted])
        rows.append({"sampler": sampler.name, "order": order, "gaussian": gaussian, "mixture": mixture})
    return rows


def flows_markdown(result: dict[str, Any]) -> str:
    """Orders and errors as Markdown tables."""
    shown = (10, 20, 40, 320)
    gaussian = [
        [row["sampler"], f"{row['order']:.2f}"]
        + [f"{row['gaussian'][FLOW_CALLS.index(calls)]['integration']:.1e}" for calls in shown]
        + [f"{row['gaussian'][FLOW_CALLS.index(calls)]['data']:.1e}" for calls in shown]
        for row in result["samplers"]
    ]
    header = [f"integration, {calls} calls" for calls in shown] + [f"data, {calls} calls" for calls in shown]
    mixture = [[row["sampler"], *(f"{point['error']:.4f}" for point in row["mixture"])] for row in result["samplers"]]
    return "\n\n".join([
        f"`{result['command']}`",
        "Gaussian data, Wasserstein-2 distance, exact; the order is fitted to the error of the integration from "
        f"{FITTED_FROM} calls on.",
        markdown_table(["sampler", "order", *header], gaussian),
        f"Mixture of three Gaussians, Wasserstein-1 distance, {result['mixture_samples']:,} samples.",
        markdown_table(["sampler", *(f"{calls} calls" for calls in MIXTURE_CALLS)], mixture),
    ])  # fmt: skip


def flows_figure(result: dict[str, Any]) -> Any:
    """Errors against model calls, log-log: the slope is the order."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(12, 4.8))
    for row in result["samplers"]:
        calls = [point["calls"] for point in row["gaussian"]]
        label = f"{row['sampler']} (order {row['order']:.2f})"
        left.loglog(calls, [point["integration"] for point in row["gaussian"]], "o-", label=label, markersize=3)
        points = row["mixture"]
        right.loglog([p["calls"] for p in points], [p["error"] for p in points], "o-", markersize=3)
    calls_drawn = np.array([40.0, 320.0])
    for order, level in ((1, 0.06), (2, 0.001)):
        left.loglog(calls_drawn, level * (calls_drawn / 40) ** -order, "k:", linewidth=1)
        left.text(calls_drawn[1], level * 8.0**-order, f"slope -{order}", fontsize=8)
    left.set(xlabel="model calls", ylabel="error of the integration (Wasserstein-2)", title="Gaussian data, exact")
    right.set(xlabel="model calls", ylabel="Wasserstein-1 to the data", title="mixture of three Gaussians")
    left.legend(fontsize=7)
    return drawn


def pixels_of(
    pipeline: TransDiffPipeline, config: dict, sampler: Sampler, calls: int, options: argparse.Namespace
) -> np.ndarray:
    """Pixels `(images, 64)` of generated digits; batches that this model left in `--keep` earlier are read from there.

    Each batch has a seed of its own: all samplers start from the same noise, whatever they draw later.
    """
    pipeline.scheduler = sampler.make(config)
    steps = sampler.steps_within(calls)
    batches = []
    count = options.num_images
    keep = options.keep and options.keep / digest_of(pipeline, config)
    parts = np.array_split(balanced_labels(count), range(BATCH_SIZE, count, BATCH_SIZE))
    for seed, labels in enumerate(parts, start=options.seed * SEED_STRIDE):
        path = keep / f"{sampler.name.replace(' ', '_')}-{calls}-{seed}-{len(labels)}.npy" if keep else None
        if path is not None and path.exists():
            batches.append(np.load(path))
            continue
        images = generate(pipeline, labels, seed=seed, num_inference_steps=steps)
        batches.append(pooled_pixels(images))
        if path is not None:
            with new_file(path) as temporary, open(temporary, "wb") as file:
                np.save(file, batches[-1])
    return np.concatenate(batches)


def digest_of(pipeline: TransDiffPipeline, config: dict) -> str:
    """A name for a model with its sampling settings: other weights draw other pixels."""
    networks = {name: getattr(pipeline, name) for name in ("condition_encoder", "transformer", "vae")}
    tensors = {f"{name}.{key}": value for name, part in networks.items() for key, value in part.state_dict().items()}
    return tensors_digest(tensors, json.dumps([pipeline.config.guidance_scale, config], sort_keys=True, default=str))


def ratio_with_interval(
    pixels: np.ndarray, baseline: np.ndarray, real: np.ndarray, replicates: int = 400
) -> tuple[float, float, float]:
    """Fréchet distance of `pixels` to `real` over that of `baseline`, with its 95% interval.

    Basic bootstrap of the logarithm over images, `pixels` and `baseline` resampled in pairs. Basic, because a
    resample lies farther from `real` than the sample it is of: its quantiles are reflected at the estimate.
    """
    estimate = math.log(frechet_distance(pixels, real) / frechet_distance(baseline, real))
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    logs = []
    for _ in range(replicates):
        rows = generator.integers(len(pixels), size=len(pixels))
        logs.append(math.log(frechet_distance(pixels[rows], real) / frechet_distance(baseline[rows], real)))
    low, high = 2 * estimate - np.quantile(logs, [0.975, 0.025])
    return math.exp(estimate), math.exp(low), math.exp(high)


def digits_settings(options: argparse.Namespace) -> list[tuple[Sampler, int]]:
    """Samplers and model calls to compare, those at the most calls first."""
    by_name = {sampler.name: sampler for sampler in (*FIXED_GRID, *(time_grids() if options.grids else []))}
    samplers = list(by_name.values())
    if options.samplers:
        samplers = [sampler for sampler in samplers if sampler.name in options.samplers]
    return [(sampler, calls) for calls in sorted(options.calls, reverse=True) for sampler in samplers]


def load(folder: str | Path) -> TransDiffPipeline:
    """The pipeline in a folder, on the accelerator if there is one."""
    with without_loading_bars():
        pipeline = TransDiffPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(best_device())
    return pipeline


def digits(options: argparse.Namespace) -> dict[str, Any]:
    """Quality of every setting, on the bundled model and its student."""
    pipeline = load(options.model)
    config = dict(pipeline.scheduler.config)
    compared = [(pipeline, *setting) for setting in digits_settings(options)]
    if options.student is not None:
        student = load(options.student)
        compared += [(student, sampler, calls) for sampler in FLOW_MAPS for calls in STUDENT_CALLS]
    real, real_labels = load_pixels(options.data, "train")
    labels, recogniser = balanced_labels(options.num_images), fit_recogniser(real, real_labels)
    real_variance = within_class_variance(real, real_labels)

    def measures(pixels: np.ndarray) -> dict[str, float]:
        return {
            "frechet": frechet_distance(pixels, real),
            "recognised": recognition(recogniser, pixels, labels),
            "variance": within_class_variance(pixels, labels) / real_variance,
        }

    baseline = pixels_of(pipeline, config, EULER_MARUYAMA, REFERENCE_CALLS, options)
    result: dict[str, Any] = {
        "command": command_line("benchmarks.few_steps"),
        "machine": describe(pipeline.device),
        "images": options.num_images,
        "seed": options.seed,
        "guidance_scale": pipeline.config.guidance_scale,
        "drift_scale": config["drift_scale"],
        "diffusion_scale": config["diffusion_scale"],
        "num_images_in_sequence": pipeline.condition_encoder.num_images,
        "reference": measures(baseline),
        "rows": [],
    }
    for model, sampler, calls in compared:
        pixels = pixels_of(model, config, sampler, calls, options)
        ratio, low, high = ratio_with_interval(pixels, baseline, real)
        steps = sampler.steps_within(calls)
        row = {"sampler": sampler.name, "steps": steps, "calls": model_calls(sampler.make(config), steps)}
        row |= {"ratio": ratio, "low": low, "high": high} | measures(pixels)
        print(row, flush=True)
        result["rows"].append(row)
        write_digits(result, options.output)
    return result


def write_digits(result: dict[str, Any], output: Path) -> None:
    """Results so far: a long run that ends early leaves what it has measured."""
    write_json(f"{output}_digits.json", result)
    write_text(f"{output}_digits.md", digits_markdown(result))
    save_figure(digits_figure(result), f"{output}_digits.png")


def digits_markdown(result: dict[str, Any]) -> str:
    """All settings as a Markdown table, the best ratios first."""
    rows = sorted(result["rows"], key=lambda row: row["ratio"])
    lines = [
        [
            row["sampler"],
            row["steps"],
            row["calls"],
            f"{row['frechet']:.3f}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f} to {row['high']:.3f}",
            f"{row['recognised']:.2%}",
            f"{row['variance']:.3f}",
        ]
        for row in rows
    ]
    machine, reference = result["machine"], result["reference"]
    introduction = (
        f"{result['images']:,} images a setting, seed {result['seed']}, guidance {result['guidance_scale']}, drift "
        f"scale {result['drift_scale']}, diffusion scale {result['diffusion_scale']}; {REFERENCE_CALLS} "
        f"Euler-Maruyama steps: {reference['frechet']:.3f}, {reference['recognised']:.2%} recognised, variance within "
        f"a class {reference['variance']:.3f} of that of the training digits. {machine['processor']}, "
        f"{machine['date']}."
    )
    header = ["sampler", "steps", "model calls", "Fréchet distance", "ratio to Euler-Maruyama 100", "95% interval"]
    header += ["recognised", "variance"]
    return "\n\n".join([f"`{result['command']}`", introduction, markdown_table(header, lines)])


def digits_figure(result: dict[str, Any]) -> Any:
    """Ratio against model calls with its interval, one line a sampler of the standard grid."""
    drawn, axes = plt.subplots(figsize=(8, 4.8))
    standard = {sampler.name for sampler in (*FIXED_GRID, *FLOW_MAPS)}
    for name in dict.fromkeys(row["sampler"] for row in result["rows"]):
        rows = sorted((row for row in result["rows"] if row["sampler"] == name), key=lambda row: row["calls"])
        calls, ratios = [row["calls"] for row in rows], [row["ratio"] for row in rows]
        bars = [[row["ratio"] - row["low"] for row in rows], [row["high"] - row["ratio"] for row in rows]]
        if name in standard:
            axes.errorbar(calls, ratios, yerr=np.maximum(bars, 0), marker="o", capsize=2, label=name)
        else:
            axes.scatter(calls, ratios, s=12, color="gray", label="_grids")
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.axhline(BOUND, color="black", linewidth=0.8, linestyle=":", label=f"{BOUND}: intervals should end below it")
    axes.set(xlabel="model calls an image", ylabel="Fréchet distance, Euler-Maruyama 100 = 1")
    axes.set_ylim(0.6, 2.2)  # a sampler above that is not worth its steps
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))  # there is no half of a call
    axes.legend(fontsize=8)
    return drawn


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["flows", "digits"], default=["flows", "digits"])
    parser.add_argument("--output", type=home_path, required=True, help="results go to OUTPUT_flows.json and so on")
    parser.add_argument("--mixture-samples", type=int, default=400_000)
    parser.add_argument("--model", default=DIGITS, help="folder of a digits pipeline; the bundled one by default")
    parser.add_argument("--student", help="folder of a flow map of --model, to measure with 1 to 4 calls beside it")
    parser.add_argument("--data", type=home_path, help="folder written by training.digits.export")
    parser.add_argument("--num-images", type=int, default=2000, help="images a setting, a multiple of ten")
    parser.add_argument("--seed", type=int, default=0, help="other noise for all: to confirm what another one chose")
    parser.add_argument("--calls", type=int, nargs="+", default=DIGITS_CALLS, help="model calls to compare at")
    parser.add_argument("--samplers", nargs="+", help="names of the samplers to compare; all by default")
    parser.add_argument("--grids", action="store_true", help="the best SDE sampler on other time grids too")
    parser.add_argument(
        "--keep", type=home_path, help="folder that keeps generated pixels for other runs, those of each model apart"
    )
    options = parser.parse_args(arguments)
    if "digits" in options.parts and options.data is None:
        parser.error("--data is needed: write the digits with `python -m training.digits.export --output FOLDER`")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    if "flows" in options.parts:
        result: dict[str, Any] = {
            "command": command_line("benchmarks.few_steps"),
            "mixture_samples": options.mixture_samples,
            "samplers": flows(options.mixture_samples),
        }
        write_json(f"{options.output}_flows.json", result)
        write_text(f"{options.output}_flows.md", flows_markdown(result))
        save_figure(flows_figure(result), f"{options.output}_flows.png")
        print(flows_markdown(result))
    if "digits" in options.parts:
        print(digits_markdown(digits(options)))


if __name__ == "__main__":
    main()
