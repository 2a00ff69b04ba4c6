"""`transdiff generate`: images from labels, or from the settings that an image carries."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .common import MODEL_HELP, Debug, DType, one_line_errors, parse_scales, scales_in_words
from .files import check_format, keeps_settings, output_name, save_image, single_files


if TYPE_CHECKING:
    from transdiff_pipelines import TransDiffPipeline
    from transdiff_pipelines.generation import GenerationSettings

MAX_CLASSES_BY_DEFAULT = 20
"""`generate` without labels draws every class of a model that has no more than this."""

# The keys of `generation.SCHEDULER_CLASSES`, which takes seconds to import.
SchedulerName = Literal["euler-maruyama", "sde-multistep", "flow-map", "euler", "heun", "dpm-solver", "unipc"]


def generate(
    labels: Annotated[
        list[str] | None,
        typer.Argument(help="Classes to draw, by number or name; all of them if there are few.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Image file to write; its suffix chooses the format. With --no-grid a folder, or a name with "
            "{label}, {seed} or {number} in it.",
            show_default="transdiff.png, or transdiff-{label}-{seed}.png",
        ),
    ] = None,
    grid: Annotated[bool, typer.Option(help="All images in one file, or one file for each.")] = True,
    from_image: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A PNG of this command or of the web demo: draw it again. Options given beside it replace its own.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help=MODEL_HELP,
            show_default="digits; emoji if the labels are names that it knows",
        ),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="Images of each label.", show_default="1")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Image i is drawn with seed + i, whatever the batch size.", show_default="0"),
    ] = None,
    guidance_scale: Annotated[
        list[str] | None,
        typer.Option(
            help="Classifier-free guidance; 1 is none. One for each image of an MRAR sequence: 1,2,2,3.",
            show_default="the model's recommendation",
            metavar="SCALE[,SCALE...]",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--num-inference-steps",
            "--steps",
            min=1,
            help="Denoising steps for each image.",
            show_default="the model's recommendation, or 100",
        ),
    ] = None,
    scheduler: Annotated[
        SchedulerName | None,
        typer.Option(help="Sampler; for few steps unipc, with --steps 10.", show_default="the model's own"),
    ] = None,
    drift_scale: Annotated[
        float | None, typer.Option(help="Drift of the SDE samplers.", show_default="the model's own")
    ] = None,
    diffusion_scale: Annotated[
        float | None, typer.Option(help="Noise of the SDE samplers, 0 for none.", show_default="the model's own")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA adapter: a file, a folder, that of a training run, or a Hub repository. Repeatable.",
            metavar="PATH",
            show_default=False,
        ),
    ] = None,
    lora_scale: Annotated[
        list[str] | None,
        typer.Option(help="Weight of each LoRA.", show_default="1 for all", metavar="SCALE[,SCALE...]"),
    ] = None,
    dtype: Annotated[DType | None, typer.Option(help="Number format of the weights.", show_default="float32")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cpu, cuda:1 or mps.", show_default="the accelerator if there is one, else cpu"),
    ] = None,
    compile_blocks: Annotated[
        bool, typer.Option("--compile", help="Compile the models' blocks: a slow start, then faster steps.")
    ] = False,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Images drawn at once; fewer take less memory. Other numbers round differently.",
            show_default="32; 1 for single files, which are then made again to the bit",
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw images of classes.

    In a grid each label has a row of its own; with one image of each, or one label, the grid is as square as their
    number allows. A PNG carries the settings it was drawn with: with --from they draw it again, to the bit on the
    same machine.

    \b
    Examples:
      transdiff generate "dog face" pizza rocket octopus   # emoji; transdiff info emoji lists the names
      transdiff generate 3 7 --output out.png            # handwritten digits
      transdiff generate --count 6                       # every digit, six times
      transdiff generate 8 -n 16 --seed 5 --scheduler unipc --steps 10   # the sampler for few steps
      transdiff generate 3 7 -n 50 --no-grid --output FOLDER             # FOLDER/3-0.png, FOLDER/3-1.png, ...
      transdiff generate 4 -n 9 --no-grid --output "four-{number}.webp"
      transdiff generate --from out.png --output again.png
      transdiff generate --from out.png --seed 100 --output others.png
      transdiff generate cats --model outputs/own_images --lora outputs/lora --lora-scale 0.8
      transdiff generate goldfish "tiger cat" 207 --model FOLDER --guidance-scale 1.5 --compile
    """
    guidance, lora_scales = _numbers("--guidance-scale", guidance_scale), _numbers("--lora-scale", lora_scale)
    with one_line_errors(debug):
        started = perf_counter()
        from transdiff_pipelines.files import check_writable

        imported = perf_counter()
        name = output_name(output, grid)
        check_writable(name)
        given = {
            "model": model,
            "count": count,
            "seed": seed,
            "guidance_scale": guidance[0] if len(guidance) == 1 else guidance or None,
            "num_inference_steps": steps,
            "scheduler": scheduler,
            "drift_scale": drift_scale,
            "diffusion_scale": diffusion_scale,
            "dtype": dtype,
            "batch_size": batch_size,
            "lora": tuple(lora or ()) or None,
            "lora_scale": lora_scales or None,
        }
        given = {key: value for key, value in given.items() if value is not None}
        settings = _settings(given, labels, from_image, grid)
        pipe = _load(settings, device)
        settings = _add_loras(pipe, settings, from_image)
        if compile_blocks:
            pipe.condition_encoder.compile_repeated_blocks()
            pipe.transformer.compile_repeated_blocks()
        if labels or from_image is None:
            settings = replace(settings, labels=_label_ids(pipe, labels))
        settings = settings.resolved(pipe)
        check_format(name, *_file_size(pipe, settings, grid))
        loaded = perf_counter()
        written = _draw_grid(pipe, settings, name) if grid else _draw_files(pipe, settings, name)
        finished = perf_counter()

        where = str(written[0]) if len(written) == 1 else f"{written[0]} to {written[-1]}"
        noun = "image" if settings.num_images == 1 else "images"
        # Nearly all of the first is torch, diffusers and what diffusers imports: our own modules take 0.1 s.
        before = (
            f"{imported - started:.1f} s to import torch and diffusers and {loaded - imported:.1f} s to load the model"
        )
        typer.echo(f"{where}: {settings.num_images} {noun} in {finished - loaded:.1f} s, after {before}")
        typer.echo(f"  {_in_words(pipe, settings)}")
        if not keeps_settings(name):
            typer.echo(f"  only a PNG keeps its settings; again: {settings.command_line()}")


def _numbers(option: str, values: Sequence[str] | None) -> tuple[float, ...]:
    """The numbers given with an option that takes several, with commas between them or one at a time."""
    try:
        return tuple(parse_scales(",".join(values))) if values else ()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def _settings(
    given: dict[str, Any], labels: Sequence[str] | None, from_image: Path | None, grid: bool
) -> "GenerationSettings":
    """The given settings, over those of an image if there is one; its labels stand until others are known."""
    from transdiff_pipelines import __version__
    from transdiff_pipelines.generation import SDE_SAMPLERS, GenerationSettings
    from transdiff_pipelines.sources import model_for_labels

    if from_image is None:
        chosen = {} if "model" in given else {"model": model_for_labels(labels or [])}
        return GenerationSettings(labels=(0,), **({} if grid else {"batch_size": 1}) | chosen | given)
    stored = GenerationSettings.from_image(from_image)
    if "model" not in given and stored.model is None and (other := model_for_labels(labels or [])):
        raise ValueError(
            f"{from_image} was drawn by the digits, which do not have these classes, and {other} has: draw without "
            f"--from, or with --model {other}"
        )
    if len(given.get("lora", stored.lora)) != len(stored.lora):  # these are others, not the same in another place
        stored = replace(stored, lora=(), lora_scale=(), lora_digest=())
    if stored.version != __version__:
        typer.echo(f"note: {from_image} was drawn by version {stored.version}, this is {__version__}", err=True)
    if given.get("scheduler", SDE_SAMPLERS[0]) not in SDE_SAMPLERS:  # the new sampler has no such scales
        stored = replace(stored, drift_scale=None, diffusion_scale=None)
    settings = replace(stored, version=__version__, **given)
    # The image names a model, which may be one to download: say so before that happens.
    typer.echo(f"{from_image}: {settings.command_line(labels)}", err=True)
    return settings


def _load(settings: "GenerationSettings", device: str | None) -> "TransDiffPipeline":
    from transdiff_pipelines.generation import load_pipeline, lora_source
    from transdiff_pipelines.half_precision import half_precision_note

    for lora in settings.lora:
        lora_source(lora)  # a missing one is an error, before the model is loaded
    pipe = load_pipeline(settings.model, settings.dtype, device)
    if note := half_precision_note(pipe.dtype, pipe.device):
        typer.echo(f"note: {note}: --dtype float32", err=True)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe


def _add_loras(
    pipe: "TransDiffPipeline", settings: "GenerationSettings", from_image: Path | None
) -> "GenerationSettings":
    """Load the adapters; a note where one is not what it was when the image was drawn."""
    from transdiff_pipelines.generation import load_loras

    loaded = load_loras(pipe, settings)
    for lora, before, now in zip(loaded.lora, settings.lora_digest, loaded.lora_digest, strict=False):
        if before != now:
            typer.echo(f"note: {from_image} was drawn with another LoRA than the one in {lora}", err=True)
    return loaded


def _label_ids(pipe: "TransDiffPipeline", labels: Sequence[str] | None) -> tuple[int, ...]:
    """Class ids of labels from a command line; of every class if there are no labels and few classes."""
    from transdiff_pipelines.pipelines.class_labels import ClassNames, parse_class_labels

    num_classes = pipe.condition_encoder.config.num_classes
    if labels:
        numbers_and_names = [int(label) if label.isdecimal() else label for label in labels]
        return tuple(parse_class_labels(numbers_and_names, ClassNames(pipe.config.id2label), num_classes))
    if num_classes > MAX_CLASSES_BY_DEFAULT:
        example = "goldfish" if "goldfish" in pipe.labels else next(iter(pipe.labels), "0")
        raise ValueError(
            f"which of the model's {num_classes} classes? Name the labels, e.g. transdiff generate "
            f"{shlex.quote(example)}"
        )
    return tuple(range(num_classes))


def _file_size(pipe: "TransDiffPipeline", settings: "GenerationSettings", grid: bool) -> tuple[int, int]:
    """Width and height in pixels of each file that will be written."""
    from transdiff_pipelines.generation import grid_shape

    side = pipe.transformer.config.sample_size * pipe.vae_scale_factor
    rows, columns = grid_shape(settings.num_images, settings.count) if grid else (1, 1)
    return columns * side, rows * side


def _draw_grid(pipe: "TransDiffPipeline", settings: "GenerationSettings", path: Path) -> list[Path]:
    from transdiff_pipelines.generation import draw, image_grid

    save_image(image_grid(list(draw(pipe, settings)), settings.count), path, settings)
    return [path]


def _draw_files(pipe: "TransDiffPipeline", settings: "GenerationSettings", pattern: Path) -> list[Path]:
    """Each image is written as soon as it is drawn: what an interruption leaves is whole."""
    from transdiff_pipelines.files import check_writable
    from transdiff_pipelines.generation import draw

    paths = single_files(pattern, settings)
    for path in paths:
        check_writable(path)
    for number, image in enumerate(draw(pipe, settings)):
        paths[number].parent.mkdir(exist_ok=True)
        save_image(image, paths[number], settings.image(number))
    return paths


def _in_words(pipe: "TransDiffPipeline", settings: "GenerationSettings") -> str:
    """How the images were drawn, for people."""
    last = settings.seed + settings.num_images - 1
    seeds = f"seed {settings.seed}" if settings.num_images == 1 else f"seeds {settings.seed} to {last}"
    scales = scales_in_words(settings.guidance_scale, settings.drift_scale, settings.diffusion_scale)
    sampler = settings.scheduler or type(pipe.scheduler).__name__
    loras = [f", LoRA {lora} at {scale:g}" for lora, scale in zip(settings.lora, settings.lora_scale, strict=True)]
    steps = f"{settings.num_inference_steps} steps of {sampler}"
    return f"{seeds}, {scales}, {steps}{''.join(loras)}, {settings.dtype} on {pipe.device}"
