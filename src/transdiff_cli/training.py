"""`transdiff train` and `transdiff evaluate`: the commands that do it, to read or to pipe into a shell.

They start nothing themselves: training belongs to accelerate, whose options (processes, machines, precision) are its
own, and its code is in the repository rather than in the installed package.
"""

import itertools
import shlex
from pathlib import Path
from typing import Annotated

import typer

from .common import Debug, one_line_errors


CONFIGS = Path("training/configs")


def train(
    config: Annotated[
        Path | None, typer.Argument(help="A training configuration; without one they are listed.", show_default=False)
    ] = None,
    debug: Debug = False,
) -> None:
    """Print the commands that train a model.

    Run them, or pipe them into a shell. To be called in a checkout of the repository, where the training code is.

    \b
    Examples:
      transdiff train                                                  # the configurations
      transdiff train training/configs/digits_1step.yaml
      transdiff train training/configs/digits_1step.yaml | sh
    """
    with one_line_errors(debug):
        _check_checkout("training/train.py")
        configs = sorted(CONFIGS.glob("*.yaml"))
        if config is None:
            for path in configs:
                typer.echo(f"# {_purpose(path)}\ntransdiff train {path}")
            return
        if not config.is_file():
            known = ", ".join(map(str, configs))
            raise FileNotFoundError(f"configuration {config} does not exist; there are {known}")
        name = shlex.quote(str(config))
        typer.echo("# Images to latents, once:")
        typer.echo(f"accelerate launch -m training.cache_latents --config {name}")
        typer.echo("# Training; run again, it continues. Before it, --dry-run shows sizes and memory:")
        typer.echo(f"accelerate launch -m training.train --config {name}")


def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or Hub repository of a pipeline.", show_default=False, metavar="MODEL")
    ],
    reference: Annotated[
        str | None,
        typer.Option(help="Real images: ADM's .npz, statistics, a folder, or hf:NAME.", show_default=False),
    ] = None,
    extractor: Annotated[
        str,
        typer.Option(help="What is compared: torch-fidelity or torchscript (Inception-v3), pixels, module:function."),
    ] = "torch-fidelity",
    num_images: Annotated[int, typer.Option("--num-images", min=1, help="Images to draw and measure.")] = 50_000,
    debug: Debug = False,
) -> None:
    """Print the command that measures a model.

    FID, sFID, Inception Score, precision and recall; without a reference, what needs none. To be called in a
    checkout of the repository, where the evaluation code is. The features are Inception's unless you choose others:
    pip install -e ".[eval]".

    \b
    Examples:
      transdiff evaluate transdiff-l --reference VIRTUAL_imagenet256_labeled.npz
      transdiff evaluate outputs/digits_mrar --extractor pixels --reference datasets/digits/test --num-images 1000
      transdiff evaluate transdiff-l --reference images/val --num-images 10000 | sh
    """
    with one_line_errors(debug):
        _check_checkout("training/evaluate.py")
        options = ["--model", model, "--num-images", str(num_images), "--extractor", extractor]
        if reference is not None:
            options += ["--reference", reference]
        output = f"eval/{Path(model).name}"
        typer.echo("# Interrupted and run again, it continues; --help has the sampling settings and searches:")
        typer.echo(f"accelerate launch -m training.evaluate {shlex.join([*options, '--output', output])}")


def _purpose(config: Path) -> str:
    """The first sentence of the comment that a configuration begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), config.read_text(encoding="utf-8").splitlines())
    comment = " ".join(line.lstrip("# ") for line in lines)
    return comment.split(". ")[0].rstrip(".")


def _check_checkout(file: str) -> None:
    if not Path(file).is_file():
        raise FileNotFoundError(
            f"{file} is not in this folder: the training code is in the repository, not in the installed package. "
            'Go to a checkout of it, pip install -e ".[train]", and call this there'
        )
