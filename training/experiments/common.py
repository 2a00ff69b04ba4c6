"""What the experiments share: loading a model, judging images, writing results and pictures."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from training.data.batches import keyed_generator
from training.data.errors import DataError
from training.digits.quality import Reference as DigitsReference
from training.digits.quality import pooled_pixels
from training.emoji.judge import Judge as EmojiJudge
from training.emoji.recogniser import load_recogniser
from training.evaluation.features import load_extractor
from training.evaluation.measure import measure_batches
from training.evaluation.quality import frechet_error
from training.evaluation.references import load_reference
from transdiff_pipelines import DIGITS, TransDiffPipeline
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import check_folder_writable, home_path, new_file
from transdiff_pipelines.generation import SCHEDULER_CLASSES, make_scheduler, without_loading_bars
from transdiff_pipelines.sources import model_source


# Images `(N, H, W, 3)` in [0, 1] and the labels `(N,)` they should show, to measures.
Judge = Callable[[np.ndarray, np.ndarray], dict[str, float]]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every experiment has."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--model", default=str(DIGITS), help="folder or Hub repository; the bundled digits model")
    result.add_argument("--output", type=home_path, required=True, help="folder for the result and the picture")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--num-inference-steps", type=int, help="default: the checkpoint's own")
    result.add_argument("--scheduler", choices=SCHEDULER_CLASSES, help="default: the checkpoint's own")
    result.add_argument("--guidance-scale", type=float, help="default: the checkpoint's own")
    return result


def add_judge_options(arguments: argparse.ArgumentParser) -> None:
    """Options for experiments that measure quality."""
    arguments.add_argument("--num-images", type=int, default=1000)
    arguments.add_argument("--batch-size", type=int, default=250)
    add_recogniser_options(arguments, "judge by its measures")
    arguments.add_argument(
        "--reference", type=os.path.expanduser, help="else: real images or statistics, as for training.evaluate"
    )
    arguments.add_argument("--extractor", default="torch-fidelity", help="as for training.evaluate")
    arguments.add_argument("--extractor-weights", type=home_path)


def add_recogniser_options(arguments: argparse.ArgumentParser, what: str) -> None:
    """Real images that a recogniser is or was trained on; `what` says what is done with it."""
    arguments.add_argument("--digits", type=home_path, help=f"digits data (training.digits.export): {what}")
    arguments.add_argument("--emoji", type=home_path, help=f"emoji data (training.emoji.render): {what}")
    arguments.add_argument(
        "--recogniser", type=home_path, help="of the emoji: the file that training.emoji.quality leaves"
    )


def emoji_judge(options: argparse.Namespace) -> EmojiJudge:
    """The judge of emoji by their held-out test drawings.

    Raises:
        SystemExit: its recogniser is not named, or is none of these drawings.
    """
    if options.recogniser is None:
        raise SystemExit("error: --emoji needs --recogniser: the file that training.emoji.quality leaves")
    try:
        return EmojiJudge(options.emoji, "test", load_recogniser(options.recogniser))
    except (DataError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def make_judge(options: argparse.Namespace, pipe: TransDiffPipeline) -> Judge:
    """Measures on digits or emoji, with the standard error of a Fréchet distance, or those of `training.evaluate`.

    That of emoji is to the held-out drawings.
    """
    if options.digits:
        digits = DigitsReference(options.digits, "test")

        def judge_digits(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
            pixels = pooled_pixels(images)
            return digits.measure(pixels, labels) | {"frechet_error": frechet_error(pixels, digits.pixels)}

        return judge_digits
    if options.emoji:
        emoji = emoji_judge(options)

        def judge_emoji(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
            measured = emoji.measure(images, labels)
            return {name.replace("frechet_held_out", "frechet"): value for name, value in measured.items()}

        return judge_emoji
    extractor = load_extractor(options.extractor, options.extractor_weights, pipe._execution_device)
    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    reference = None
    if options.reference:
        reference = load_reference(options.reference, extractor, options.extractor, side, options.output)

    def judge(images: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        pixels = torch.from_numpy((images * 255).round().astype(np.uint8)).permute(0, 3, 1, 2)
        return measure_batches(iter(pixels.split(100)), len(pixels), extractor, reference)["metrics"]

    return judge


def named_models(entries: Sequence[str]) -> dict[str, str]:
    """NAME=FOLDER arguments as a dictionary.

    Raises:
        SystemExit: an entry has another form.
    """
    for entry in entries:
        if not all(entry.partition("=")):
            raise SystemExit(f"error: --models {entry!r}: expected NAME=FOLDER")
    return dict(entry.split("=", 1) for entry in entries)


def load(options: argparse.Namespace) -> TransDiffPipeline:
    """The model, on the accelerator if there is one; before it is loaded, the output folder is tried.

    Raises:
        SystemExit: there is no such model, or the output cannot be written.
    """
    try:
        check_folder_writable(options.output)
        with without_loading_bars():
            pipe = TransDiffPipeline.from_pretrained(model_source(options.model))
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    pipe.scheduler = make_scheduler(pipe.scheduler, options.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(best_device())


def call_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline's call; pictures as arrays."""
    names = ("guidance_scale", "num_inference_steps")
    return {name: getattr(options, name) for name in names} | {"output_type": "np"}


def generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """One generator for each image, from its index."""
    return [keyed_generator(seed, index) for index in indices]


def balanced(count: int, num_classes: int) -> np.ndarray:
    """Labels 0, 1, ... in turn."""
    return np.arange(count) % num_classes


def picture(rows: Sequence[np.ndarray], gap: int = 2) -> Image.Image:
    """Rows of images `(n, H, W, 3)` in [0, 1] as one picture, with gaps; a row may be shorter than the others."""
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    canvas = np.ones((len(rows) * (height + gap) - gap, columns * (width + gap) - gap, 3))
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            canvas[i * (height + gap) :, j * (width + gap) :][:height, :width] = image
    return Image.fromarray((canvas * 255).round().astype(np.uint8))


def write(folder: Path, name: str, result: dict[str, Any], image: Image.Image | None = None) -> None:
    """NAME.json and NAME.png."""
    with new_file(folder / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    if image is not None:
        with new_file(folder / f"{name}.png") as temporary:
            image.save(temporary, format="png", optimize=True)


def facts(options: argparse.Namespace, pipe: TransDiffPipeline) -> dict[str, Any]:
    """What a result was made with."""
    scales = {name: pipe.scheduler.config.get(name) for name in ("drift_scale", "diffusion_scale")}
    guidance = pipe.config.guidance_scale if options.guidance_scale is None else options.guidance_scale
    return {
        "model": Path(options.model).name,
        "images_in_sequence": pipe.condition_encoder.num_images,
        "seed": options.seed,
        "scheduler": type(pipe.scheduler).__name__,
        "num_inference_steps": options.num_inference_steps or pipe.recommended_num_inference_steps,
        "guidance_scale": guidance,
        **scales,
    }
