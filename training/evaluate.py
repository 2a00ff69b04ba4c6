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
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from training.digits.export import new_file
from training.distributed.processes import process_state
from training.evaluation.features import ExtractorError, load_extractor
from training.evaluation.measure import measure
from training.evaluation.references import ReferenceImagesError, load_reference
from training.evaluation.report import write_report
from training.evaluation.sampling import (
    LABEL_MODES,
    SamplingError,
    check_settings,
    image_path,
    make_labels,
    sample,
    write_npz,
)
from training.evaluation.search import SEARCHED, parse_axis, plot_search
from transdiff_pipelines import TransDiffPipeline
from transdiff_pipelines.loaders.original_checkpoint import match_published


ERRORS = (SamplingError, ExtractorError, ReferenceImagesError)
SCALES = ("drift_scale", "diffusion_scale")


def load_pipeline(options: argparse.Namespace, device: torch.device) -> TransDiffPipeline:
    """The model to evaluate, on this process's device."""
    pipe = TransDiffPipeline.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


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
    extra = {"num_inference_steps": options.num_inference_steps, "num_ar_steps": options.num_ar_steps}
    return settings | given | extra


def set_scales(pipe: TransDiffPipeline, settings: dict[str, Any]) -> None:
    """Give the scheduler the drift and diffusion scales."""
    scales = {name: settings[name] for name in SCALES if settings[name] is not None}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scales)


def evaluate(pipe: TransDiffPipeline, options: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
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
    call = {name: settings[name] for name in ("guidance_scale", "num_inference_steps", "num_ar_steps")}
    shared = (state.process_index, state.num_processes)
    made = sample(pipe, labels, folder, options.seed, options.batch_size, call, *shared)
    seconds = time.perf_counter() - started
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    result = {**identity, "reference": options.reference, "extractor": options.extractor}
    previous = _finished(folder / "results.json", result)
    if previous is not None and not made:
        return previous
    paths = [image_path(folder, index) for index in range(options.num_images)]
    if options.npz:
        write_npz(paths, folder / f"samples_{options.num_images}.npz")
    result["seconds_per_image"] = seconds / made if made else (previous or {}).get("seconds_per_image")
    result |= _measure(paths, pipe, options, state.device)
    write_report(result, paths, folder)
    return result


def _finished(path: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """A result written earlier with the same settings, reference and extractor."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    expected = json.loads(json.dumps(expected))
    return result if expected.items() <= result.items() else None


def _measure(
    paths: list[Path], pipe: TransDiffPipeline, options: argparse.Namespace, device: torch.device
) -> dict[str, Any]:
    if options.extractor is None:
        reason = "no feature extractor was chosen (--extractor)"
        return {"metrics": {}, "not_computed": {"all": reason}, "notes": []}
    extractor = load_extractor(options.extractor, options.extractor_weights, device)
    reference = None
    if options.reference is not None:
        side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
        cache = options.reference_cache
        reference = load_reference(options.reference, extractor, options.extractor, side, cache)
    with torch.no_grad():
        return measure(paths, extractor, reference)


def search(pipe: TransDiffPipeline, options: argparse.Namespace) -> list[dict[str, Any]] | None:
    """Evaluate every combination of the searched values; what is finished is not done again."""
    axes = dict(options.search)
    results = []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = "_".join(f"{axis}-{value:g}" for axis, value in point.items())
        chosen = argparse.Namespace(**{**vars(options), **point})
        results.append(evaluate(pipe, chosen, options.output / name))
    if not process_state().is_main_process:
        return None
    rows = [{"sampling": result["sampling"], "metrics": result["metrics"]} for result in results if result]
    with new_file(options.output / "search.json") as temporary:
        temporary.write_text(json.dumps({"axes": axes, "results": rows}, indent=2) + "\n")
    if options.metric in rows[0]["metrics"]:
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
    parser.add_argument("--output", type=Path, required=True, help="folder for images and results")
    parser.add_argument("--num-images", type=int, default=50_000)
    parser.add_argument("--labels", choices=LABEL_MODES, default="balanced", help="as many of each class, or drawn")
    parser.add_argument("--seed", type=int, default=0, help="with an image's index it decides the image")
    parser.add_argument("--batch-size", type=int, default=64, help="images a process makes at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    sampling = parser.add_argument_group("sampling; the checkpoint's own settings by default")
    sampling.add_argument("--settings", choices=("checkpoint", "published"), default="checkpoint")
    sampling.add_argument("--preset", help="published model whose settings to take, where sizes do not tell")
    sampling.add_argument("--guidance-scale", type=float, help="1 is without guidance")
    sampling.add_argument("--drift-scale", type=float)
    sampling.add_argument("--diffusion-scale", type=float)
    sampling.add_argument("--num-inference-steps", type=int, default=100)
    sampling.add_argument("--num-ar-steps", type=int, help="MRAR: stop after this image of the sequence")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--extractor", help="torch-fidelity, torchscript, pixels or module:function")
    measuring.add_argument("--extractor-weights", type=Path, help="local weights of the extractor")
    measuring.add_argument("--reference", help=".npz (ADM batch, statistics, images), folder, or hf:NAME[:SPLIT]")
    measuring.add_argument(
        "--reference-cache", type=Path, default=Path("~/.cache/transdiff_pipelines").expanduser(), help="folder"
    )
    measuring.add_argument("--npz", action="store_true", help="also write all images as one ADM .npz")
    measuring.add_argument(
        "--search", type=parse_axis, action="append", metavar="NAME=V,V,...", help=f"grid over {', '.join(SEARCHED)}"
    )
    measuring.add_argument("--metric", default="fid", help="what the heat map of a search shows")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    options = parse(arguments)
    state = process_state()
    try:
        pipe = load_pipeline(options, state.device)
        if options.search:
            search(pipe, options)
            return
        result = evaluate(pipe, options, options.output)
    except ERRORS as error:
        sys.exit(f"error: {error}")
    if result is not None:
        print(summary(result))


if __name__ == "__main__":
    main()
