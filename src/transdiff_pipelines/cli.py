"""The `transdiff` command: images from labels, and conversion of the authors' checkpoints.

Torch and the models are imported inside the commands, where they are needed. An error is one line that names the
remedy (exit code 1; wrong usage 2; Ctrl-C 130), and `--debug` shows its traceback. Files appear whole or not at all.
"""

import inspect
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from . import __version__


if TYPE_CHECKING:
    import torch
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
    from PIL import Image

    from .pipelines import TransDiffPipeline

MAX_CLASSES_BY_DEFAULT = 20
"""`generate` without labels draws every class of a model that has no more than this."""

DType = Literal["float32", "bfloat16", "float16"]
SchedulerName = Literal["euler-maruyama", "sde-multistep", "euler", "heun", "dpm-solver", "unipc"]

# The samplers that were tried on this flow: two of the paper's SDE, then diffusers' of the probability-flow ODE.
SCHEDULER_CLASSES: dict[str, str] = {
    "euler-maruyama": "FlowMatchEulerMaruyamaScheduler",
    "sde-multistep": "FlowMatchSDEMultistepScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
}

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

app = typer.Typer(
    name="transdiff",
    help="Class-to-image generation with TransDiff: an autoregressive transformer conditions a diffusion decoder.",
    epilog="`transdiff COMMAND --help` has examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the `transdiff` command."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"transdiff_pipelines {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def generate(
    labels: Annotated[
        list[str] | None,
        typer.Argument(help="Classes to draw, by number or name; all of them if there are few.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Image file to write; its suffix chooses the format.")
    ] = Path("transdiff.png"),
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Folder or Hub repository of a pipeline; the bundled digits if not given."),
    ] = None,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Images of each label.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Image i is drawn with seed + i, whatever the batch size.")] = 0,
    guidance_scale: Annotated[
        list[float] | None,
        typer.Option(
            help="Classifier-free guidance; 1 is none. Given several times: one for each image of an MRAR sequence. "
            "The model's recommendation if not given.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int, typer.Option("--num-inference-steps", "--steps", min=1, help="Denoising steps for each image.")
    ] = 100,
    scheduler: Annotated[
        SchedulerName | None, typer.Option(help="Sampler; the model's own if not given.", show_default=False)
    ] = None,
    drift_scale: Annotated[
        float | None, typer.Option(help="Drift of the SDE samplers; the model's own if not given.")
    ] = None,
    diffusion_scale: Annotated[
        float | None,
        typer.Option(help="Noise of the SDE samplers, 0 for none; the model's own if not given."),
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of the weights.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="Such as cpu, cuda:1 or mps; the accelerator if there is one.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images drawn at once; fewer take less memory.")] = 32,
    debug: Debug = False,
) -> None:
    """Draw images of classes into one file.

    Each label has a row of its own; with one image of each, or one label, the grid is as square as their number
    allows.

    \b
    Examples:
      transdiff generate 3 7 --output out.png            # the bundled model's digits 3 and 7
      transdiff generate --count 6                       # every class of the bundled model, six times
      transdiff generate 8 -n 16 --seed 5 --scheduler heun --steps 20
      transdiff generate goldfish "tiger cat" 207 --model FOLDER --guidance-scale 1.5
    """
    with _one_line_errors(debug):
        started = perf_counter()
        _check_image_path(output)
        pipe = _load_pipeline(model, dtype, device)
        _set_scheduler(pipe, scheduler, drift_scale, diffusion_scale)
        label_ids = _label_ids(pipe, labels)
        guidance = _guidance(guidance_scale)
        loaded = perf_counter()
        images = _draw(pipe, label_ids, count, seed, guidance, steps, batch_size)
        _save_image(_grid(images, len(label_ids), count), output)
        finished = perf_counter()

        noun = "image" if len(images) == 1 else "images"
        seconds = f"{finished - loaded:.1f} s, after {loaded - started:.1f} s to load"
        typer.echo(f"{output}: {len(images)} {noun} in {seconds}")
        typer.echo(f"  {_settings(pipe, seed, len(images), guidance, steps)}")


@app.command()
def convert(
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder for the diffusers pipeline.")],
    checkpoint: Annotated[
        Path | None, typer.Argument(help="A released checkpoint-last.pth on this machine.", show_default=False)
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="Its VAE: the released .pth, or an AutoencoderKL folder.")] = None,
    repo: Annotated[
        str | None, typer.Option(help="Hub repository to download from instead, laid out as the authors' is.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Which model of the repository.")] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option(min=1, help="For widths that no published model has: shapes do not tell the heads.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published model whose sampling settings to store, for others like it.")
    ] = None,
    dtype: Annotated[DType, typer.Option(help="Number format of the stored weights.")] = "float32",
    debug: Debug = False,
) -> None:
    """Convert a checkpoint of the TransDiff authors to a folder that diffusers loads.

    The averaged (EMA) weights are taken, the configuration is read off their shapes, and the published sampling
    settings are stored with them.

    \b
    Examples:
      transdiff convert --repo zhendch/Transdiff --model transdiff_l_mrar --output transdiff-l-mrar
      transdiff convert checkpoint-last.pth --vae vae/checkpoint-last.pth --output FOLDER --dtype bfloat16
    """
    if (checkpoint is None) == (repo is None):
        raise typer.BadParameter("give either CHECKPOINT, a file on this machine, or --repo, to download from")
    if checkpoint is not None and (vae is None or model is not None):
        raise typer.BadParameter("with CHECKPOINT give --vae, and no --model")
    if repo is not None and (model is None or vae is not None):
        raise typer.BadParameter("with --repo give --model, and no --vae: it is in the repository")
    with _one_line_errors(debug):
        import torch

        from .loaders import check_output_folder, convert_original_checkpoint, download_original, save_converted
        from .presets import ORIGINAL_REPOSITORY, PUBLISHED

        check_output_folder(output)
        if checkpoint is None or vae is None:
            checkpoint, vae = download_original(str(model), str(repo))
        pipe = convert_original_checkpoint(checkpoint, vae, num_attention_heads, preset, dtype=getattr(torch, dtype))
        # Weights of a known origin get their model card; of any other file nothing is known but its shape.
        published = PUBLISHED.get(str(model)) if repo == ORIGINAL_REPOSITORY else None
        save_converted(pipe, output, card=published)

        parameters = pipe.condition_encoder.num_parameters() + pipe.transformer.num_parameters()
        typer.echo(f"{output}: {parameters:,} parameters beside the VAE's; recommended {_scales(pipe, None)}")
        typer.echo(f"  next: transdiff generate {_example_label(pipe)} --model {output}")


@contextmanager
def _one_line_errors(debug: bool) -> Iterator[None]:
    """Print an exception as one line and exit with 1; with `debug` let it through."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        # These name value, expectation and remedy; anything else was not foreseen, so its type helps.
        if not message or not isinstance(error, (ValueError, TypeError, OSError)):
            message = f"{type(error).__name__}: {message} (--debug shows the traceback)"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from error


def _check_image_path(path: Path) -> None:
    """Raise ValueError or OSError for a file that could not be written after all the work."""
    from PIL import Image

    suffix = path.suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(
            f"output {str(path)!r} has no suffix of an image format; name it {path.stem}.png, for example"
        )
    if path.is_dir():
        raise IsADirectoryError(f"output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of output {path} does not exist; make it first: mkdir -p {path.parent}")


def _load_pipeline(model: str | None, dtype: str, device: str | None) -> "TransDiffPipeline":
    import torch
    from diffusers.utils import logging as diffusers_logging

    from . import DIGITS, TransDiffPipeline

    place = _device(device)
    if model is None:
        model = str(DIGITS)
    elif Path(model).is_file():
        raise ValueError(
            f"model {model} is a file; expected a pipeline's folder. A released checkpoint is converted first: "
            f"transdiff convert {model} --vae VAE.pth --output FOLDER"
        )
    elif not Path(model).exists() and not _is_repository_name(model):
        raise FileNotFoundError(f"model {model} does not exist; expected a pipeline's folder or a Hub OWNER/NAME")
    diffusers_logging.disable_progress_bar()  # the bar of loading; that of drawing is the pipeline's own
    pipe = TransDiffPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(place)


def _is_repository_name(model: str) -> bool:
    """Whether `model` reads as OWNER/NAME and not as a path."""
    return model.count("/") == 1 and model[0] not in "./~" and not model.endswith("/")


def _device(name: str | None) -> "torch.device":
    import torch

    best = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if name is None:
        return best
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here; this machine's best is {str(best)!r}") from error


def _set_scheduler(
    pipe: "TransDiffPipeline", name: str | None, drift_scale: float | None, diffusion_scale: float | None
) -> None:
    """Swap the pipeline's scheduler for the one called `name`, with the scales that are given."""
    import diffusers

    scales = {"drift_scale": drift_scale, "diffusion_scale": diffusion_scale}
    scales = {key: value for key, value in scales.items() if value is not None}
    cls: type[SchedulerMixin] = getattr(diffusers, SCHEDULER_CLASSES[name]) if name else type(pipe.scheduler)
    if scales and not _has_scales(cls):
        option = "--" + next(iter(scales)).replace("_", "-")
        samplers = ", ".join(key for key, value in SCHEDULER_CLASSES.items() if _has_scales(getattr(diffusers, value)))
        raise ValueError(f"{option} is for the SDE samplers ({samplers}); {cls.__name__} has no such scale")
    if name or scales:
        pipe.scheduler = cls.from_config(pipe.scheduler.config, **scales)


def _has_scales(scheduler_class: "type[SchedulerMixin]") -> bool:
    return "drift_scale" in inspect.signature(scheduler_class).parameters


def _label_ids(pipe: "TransDiffPipeline", labels: Sequence[str] | None) -> list[int]:
    """Class ids of labels from a command line; of every class if there are no labels and few classes."""
    from .pipelines.class_labels import ClassNames, parse_class_labels

    num_classes = pipe.condition_encoder.config.num_classes
    if labels:
        numbers_and_names = [int(label) if label.isdecimal() else label for label in labels]
        return parse_class_labels(numbers_and_names, ClassNames(pipe.config.id2label), num_classes)
    if num_classes > MAX_CLASSES_BY_DEFAULT:
        example = f"transdiff generate {_example_label(pipe)}"
        raise ValueError(f"which of the model's {num_classes} classes? Name the labels, e.g. {example}")
    return list(range(num_classes))


def _example_label(pipe: "TransDiffPipeline") -> str:
    return "goldfish" if "goldfish" in pipe.labels else "0"


def _guidance(values: Sequence[float] | None) -> float | list[float] | None:
    """One value stands for the whole sequence, several for its images one by one."""
    if not values:
        return None
    return values[0] if len(values) == 1 else list(values)


def _draw(
    pipe: "TransDiffPipeline",
    label_ids: Sequence[int],
    count: int,
    seed: int,
    guidance: float | list[float] | None,
    steps: int,
    batch_size: int,
) -> "list[Image.Image]":
    """`count` images of each label. Every image has a generator of its own, so batches do not change it."""
    import torch

    labels = [label for label in label_ids for _ in range(count)]
    generators = [torch.Generator().manual_seed(seed + number) for number in range(len(labels))]
    images: list[Image.Image] = []
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        images += pipe(labels[batch], guidance, steps, generators[batch]).images
    return images


def _grid(images: "list[Image.Image]", num_labels: int, count: int) -> "Image.Image":
    from diffusers.utils import make_image_grid

    number = len(images)
    if num_labels > 1 and count > 1:
        columns = count
    else:  # the smallest divisor that makes the grid at least as wide as high
        columns = next(n for n in range(1, number + 1) if number % n == 0 and n * n >= number)
    return make_image_grid(images, rows=number // columns, cols=columns)


def _save_image(image: "Image.Image", path: Path) -> None:
    """Write to a temporary name, then rename: an interrupted write leaves what was there."""
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        image.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _settings(
    pipe: "TransDiffPipeline", seed: int, number: int, guidance: float | list[float] | None, steps: int
) -> str:
    """What it takes to make the images again, for people."""
    seeds = f"seed {seed}" if number == 1 else f"seeds {seed} to {seed + number - 1}"
    dtype = str(pipe.transformer.dtype).removeprefix("torch.")
    scheduler = type(pipe.scheduler).__name__
    return f"{seeds}, {_scales(pipe, guidance)}, {steps} steps of {scheduler}, {dtype} on {pipe.device}"


def _scales(pipe: "TransDiffPipeline", guidance: float | list[float] | None) -> str:
    """Guidance, given or the pipeline's own, and the scheduler's scales where it has them."""
    if guidance is None:
        guidance = pipe.config.guidance_scale
    text = f"guidance {1.0 if guidance is None else guidance}"
    if _has_scales(type(pipe.scheduler)):
        config = pipe.scheduler.config
        text += f", drift scale {config.drift_scale}, diffusion scale {config.diffusion_scale}"
    return text
