"""Sample a model and measure it: FID, sFID, Inception Score, precision, recall.

    accelerate launch -m training.evaluate --model FOLDER --num-images 50000 --settings published \
        --reference VIRTUAL_imagenet256_labeled.npz --output eval/transdiff_l

writes images, `results.json`, `results.md`, `model-index.yml` and `samples.png`. Interrupted and started again, it
continues. With `--search guidance_scale=1,1.2,1.4 --search drift_scale=0.85,0.9` every combination is evaluated into
a folder of its own, and `search.json` and `search.png` (a heat map) sum up.
"""

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from training.command_line import positive
from training.data.errors import DataError
from training.distributed.processes import process_state, processes
from training.evaluation.features import Extractor, ExtractorError, load_extractor, try_extractor
from training.evaluation.measure import TITLES, measure, not_computed
from training.evaluation.references import Reference, ReferenceImagesError, check_fits, load_reference
from training.evaluation.report import write_report
from training.evaluation.sampling import (
    LABEL_MODES,
    SamplingError,
    check_call,
    check_settings,
    image_path,
    make_labels,
    sample,
    write_npz,
)
from training.evaluation.search import SEARCHED, parse_axis, plot_search
from transdiff_cli.common import parse_scales, reader_may_leave
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.files import check_folder_writable, home_path, new_file
from transdiff_pipelines.generation import SCHEDULER_CLASSES, make_scheduler, without_loading_bars
from transdiff_pipelines.half_precision import half_precision_note
from transdiff_pipelines.loaders.original_checkpoint import match_published
from transdiff_pipelines.sources import model_source


ERRORS = (SamplingError, DataError, ExtractorError, ReferenceImagesError, OSError)
SCALES = ("drift_scale", "diffusion_scale")


def load_pipeline(options: argparse.Namespace, device: torch.device) -> TransDiffPipeline:
    """The model to evaluate, on this process's device.

    Raises:
        SamplingError: there is none, or it cannot be loaded.
    """
    try:
        with without_loading_bars():
            pipe = TransDiffPipeline.from_pretrained(model_source(options.model), dtype=getattr(torch, options.dtype))
    except (OSError, ValueError) as error:
        raise SamplingError(str(error)) from error
    pipe.scheduler = make_scheduler(pipe.scheduler, options.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


@dataclass
class Measures:
    """What samples are measured with, loaded and tried before the first is drawn; without an extractor nothing is."""

    extractor: Extractor | None = None
    reference: Reference | None = None


def load_measures(pipe: TransDiffPipeline, options: argparse.Namespace, device: torch.device) -> Measures:
    """The extractor and the reference that the options name.

    Raises:
        ExtractorError, ReferenceImagesError: one cannot be used, the two do not fit together, or what a search maps
            cannot be computed with them.
    """
    if options.extractor is None:
        if options.reference is not None:
            raise ExtractorError(
                f"reference {options.reference} was given, but no extractor of features to compare: add --extractor "
                "torch-fidelity (Inception-v3), or another of --help"
            )
        if options.search:
            raise ExtractorError(
                f"--search draws a map of --metric {options.metric}, but no extractor of features was chosen: add "
                "--extractor torch-fidelity (Inception-v3), or another of --help"
            )
        return Measures()
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    with torch.no_grad():
        extractor = load_extractor(options.extractor, options.extractor_weights, device)
        features = try_extractor(options.extractor, extractor, side)
        reference = None
        if options.reference is not None:
            cache = options.reference_cache
            reference = load_reference(options.reference, extractor, options.extractor, side, cache)
            check_fits(reference, options.reference, features, options.extractor)
    reason = not_computed(features, reference, options.num_images).get(options.metric)
    if options.search and reason is not None:
        raise ExtractorError(
            f"--search draws a map of --metric {options.metric}, which cannot be computed: {reason}; choose another "
            "--metric, or give what it needs"
        )
    return Measures(extractor, reference)


def sampling_settings(pipe: TransDiffPipeline, options: argparse.Namespace) -> dict[str, Any]:
    """What is sampled with: the options, and what they leave open from the paper or the checkpoint.

    Raises:
        SamplingError: `--settings published` for a model that is none of the published ones.
    """
    settings = {
        "guidance_scale": 1.0 if pipe.config.guidance_scale is None else pipe.config.guidance_scale,
        **{name: pipe.scheduler.config.get(name) for name in SCALES},
    }
    if options.settings == "published":
        configs = pipe.condition_encoder.config, pipe.transformer.config
        try:
            published = match_published(*configs, options.preset)
        except ValueError as error:
            raise SamplingError(str(error)) from error
        if published is None:
            raise SamplingError(
                f"{options.model} has not the sizes of a published model, so there are no published settings for it; "
                "name the model whose settings to take with --preset, or leave --settings out"
            )
        settings = {name: getattr(published, name) for name in settings}
    given = {name: getattr(options, name) for name in settings if getattr(options, name) is not None}
    unknown = [name for name in SCALES if name in given and pipe.scheduler.config.get(name) is None]
    if unknown:
        raise SamplingError(f"{type(pipe.scheduler).__name__} has no {', '.join(unknown)}; leave the option out")
    extra = {
        "num_inference_steps": options.num_inference_steps or pipe.recommended_num_inference_steps,
        "num_ar_steps": options.num_ar_steps,
        "scheduler": type(pipe.scheduler).__name__,
    }
    return settings | given | extra


def set_scales(pipe: TransDiffPipeline, settings: dict[str, Any]) -> None:
    """Give the scheduler the drift and diffusion scales.

    Raises:
        SamplingError: it cannot have one of them.
    """
    scales = {name: settings[name] for name in SCALES if settings[name] is not None}
    try:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scales)
    except ValueError as error:
        raise SamplingError(str(error)) from error


def call_arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """What the pipeline's call takes of the sampling settings; the scheduler has the others."""
    return {name: settings[name] for name in ("guidance_scale", "num_inference_steps", "num_ar_steps")}


def points(options: argparse.Namespace) -> dict[Path, argparse.Namespace]:
    """What is evaluated, by its folder: the options as they are, or every combination of the searched values."""
    if not options.search:
        return {options.output: options}
    axes = dict(options.search)
    chosen = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return {
        options.output / "_".join(f"{axis}-{value:g}" for axis, value in point.items()): argparse.Namespace(
            **{**vars(options), **point}
        )
        for point in chosen
    }


def check_options(pipe: TransDiffPipeline, options: argparse.Namespace) -> None:
    """Try everything that sampling will be asked for, so that nothing of it is found after hours.

    Raises:
        SamplingError: naming what cannot be.
    """
    make_labels(options.num_images, pipe.condition_encoder.config.num_classes, options.labels, options.seed)
    for point in points(options).values():
        settings = sampling_settings(pipe, point)
        set_scales(pipe, settings)
        check_call(pipe, call_arguments(settings))


def evaluate(
    pipe: TransDiffPipeline, options: argparse.Namespace, folder: Path, measures: Measures
) -> dict[str, Any] | None:
    """Sample into `folder` and measure there; the result on the main process, None on the others.

    A result that is there is returned as it is.
    """
    state = process_state()
    settings = sampling_settings(pipe, options)
    set_scales(pipe, settings)
    labels = make_labels(options.num_images, pipe.condition_encoder.config.num_classes, options.labels, options.seed)
    identity = {name: getattr(options, name) for name in ("model", "dtype", "num_images", "labels", "seed")}
    identity |= {"batch_size": options.batch_size, "sampling": settings}
    if state.is_main_process:
        check_settings(folder, identity)
    state.wait_for_everyone()

    started = time.perf_counter()
    call = call_arguments(settings)
    shared = (state.process_index, state.num_processes)
    made = sample(pipe, labels, folder, options.seed, options.batch_size, call, *shared)
    seconds = time.perf_counter() - started
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    result = {**identity, "reference": options.reference, "extractor": options.extractor}
    previous = _finished(folder / "results.json", result)
    paths = [image_path(folder, index) for index in range(options.num_images)]
    archive = folder / f"samples_{options.num_images}.npz"
    if options.npz and (made or not archive.exists()):
        write_npz(paths, archive)
    if previous is not None and not made:
        return previous
    result["seconds_per_image"] = seconds / made if made else (previous or {}).get("seconds_per_image")
    if measures.extractor is None:
        reason = "no feature extractor was chosen (--extractor)"
        result |= {"metrics": {}, "not_computed": {"all": reason}, "notes": []}
    else:
        with torch.no_grad():
            result |= measure(paths, measures.extractor, measures.reference)
    write_report(result, paths, folder)
    return result


def _finished(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """A result written earlier with the same settings, reference and extractor."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    expected = json.loads(json.dumps(expected))
    return result if expected.items() <= result.items() else None


def search(pipe: TransDiffPipeline, options: argparse.Namespace, measures: Measures) -> list[dict[str, Any]] | None:
    """Evaluate every combination of the searched values; what is finished is not done again."""
    axes = dict(options.search)
    results = [evaluate(pipe, point, folder, measures) for folder, point in points(options).items()]
    if not process_state().is_main_process:
        return None
    rows = [{"sampling": result["sampling"], "metrics": result["metrics"]} for result in results if result]
    with new_file(options.output / "search.json") as temporary:
        temporary.write_text(json.dumps({"axes": axes, "results": rows}, indent=2) + "\n")
    if rows:
        plot_search(axes, rows, options.metric, options.output / "search.png")
    return rows


def summary(result: dict[str, Any]) -> str:
    """What to print: the metrics, what could not be computed and why, and what limits the values."""
    lines = [f"{name}: {value:.4f}" for name, value in result["metrics"].items()]
    lines += [f"{name}: not computed, {reason}" for name, reason in result["not_computed"].items()]
    return "\n".join(lines + [f"note: {note}" for note in result["notes"]])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="training.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a TransDiffPipeline")
    parser.add_argument("--output", type=home_path, required=True, help="folder for images and results")
    parser.add_argument("--num-images", type=positive, default=50_000)
    parser.add_argument("--labels", choices=LABEL_MODES, default="balanced", help="as many of each class, or drawn")
    parser.add_argument("--seed", type=int, default=0, help="with an image's index it decides the image")
    parser.add_argument("--batch-size", type=positive, default=64, help="images a process makes at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    sampling = parser.add_argument_group("sampling; the checkpoint's own settings by default")
    sampling.add_argument("--settings", choices=("checkpoint", "published"), default="checkpoint")
    sampling.add_argument("--preset", help="published model whose settings to take, where sizes do not tell")
    sampling.add_argument(
        "--guidance-scale",
        type=guidance,
        metavar="SCALE[,SCALE...]",
        help="1 is without guidance; one for each image of an MRAR sequence: 1,2,2,3",
    )
    sampling.add_argument("--drift-scale", type=float)
    sampling.add_argument("--diffusion-scale", type=float)
    sampling.add_argument("--scheduler", choices=SCHEDULER_CLASSES, help="such as unipc, with fewer steps")
    sampling.add_argument("--num-inference-steps", type=positive)
    sampling.add_argument("--num-ar-steps", type=positive, help="MRAR: stop after this image of the sequence")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--extractor", help="torch-fidelity, torchscript, pixels or module:function")
    measuring.add_argument("--extractor-weights", type=home_path, help="local weights of the extractor")
    measuring.add_argument(
        "--reference", type=os.path.expanduser, help=".npz (ADM batch, statistics, images), folder, or hf:NAME[:SPLIT]"
    )
    measuring.add_argument(
        "--reference-cache", type=home_path, default=home_path("~/.cache/transdiff_pipelines"), help="folder"
    )
    measuring.add_argument("--npz", action="store_true", help="also write all images as one ADM .npz")
    measuring.add_argument(
        "--search", type=parse_axis, action="append", metavar="NAME=V,V,...", help=f"grid over {', '.join(SEARCHED)}"
    )
    measuring.add_argument("--metric", choices=list(TITLES), default="fid", help="what the heat map of a search shows")
    options = parser.parse_args(arguments)
    refuse_useless(parser, options)
    return options


def refuse_useless(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """End with a usage error where an option would have no effect, or would replace another one."""
    if options.preset is not None and options.settings != "published":
        parser.error("--preset names whose published settings to take: add --settings published")
    if options.extractor_weights is not None and options.extractor is None:
        parser.error("--extractor-weights are those of an extractor: add --extractor")
    axes = [name for name, _ in options.search or []]
    for name in axes:
        if axes.count(name) > 1:
            parser.error(f"--search {name} is given twice: write all of its values with commas in one")
        if getattr(options, name) is not None:
            parser.error(f"{name} is searched and set: leave --{name.replace('_', '-')} out")


def guidance(text: str) -> float | list[float]:
    """One number, or one for each image of a sequence."""
    try:
        scales = parse_scales(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return scales[0] if len(scales) == 1 else scales


@reader_may_leave()
def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    with processes() as state:
        try:
            result = run(options, state)
        except ERRORS as error:
            sys.exit(f"error: {error}")
    if result is not None:
        print(summary(result))


def run(options: argparse.Namespace, state: PartialState) -> dict[str, Any] | None:
    """Check everything, then search or evaluate; an evaluation's result on the main process."""
    check_folder_writable(options.output)
    pipe = load_pipeline(options, state.device)
    check_options(pipe, options)
    if state.is_main_process and (note := half_precision_note(getattr(torch, options.dtype), state.device)):
        print(f"note: {note}: --dtype float32", file=sys.stderr)
    measures = load_measures(pipe, options, state.device) if state.is_main_process else Measures()
    if options.search:
        search(pipe, options, measures)
        return None
    return evaluate(pipe, options, options.output, measures)


if __name__ == "__main__":
    main()
