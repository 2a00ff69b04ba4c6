"""The `transdiff` command: one module for each subcommand.

It is a package beside `transdiff_pipelines`, which takes seconds to import: what a subcommand needs of it is imported
inside the subcommand, so that help and usage errors come at once. An error is one line that names the remedy (exit
code 1; wrong usage 2; Ctrl-C 130), and `--debug` shows its traceback. Files appear whole or not at all.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from .common import Command, reader_may_leave
from .convert import convert
from .demo import demo
from .generate import generate
from .info import info
from .training import evaluate, train


app = typer.Typer(
    name="transdiff",
    help="Class-to-image generation with TransDiff: an autoregressive transformer conditions a diffusion decoder.",
    epilog="`transdiff COMMAND --help` has examples.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (generate, info, demo, convert, train, evaluate):
    app.command(cls=Command)(command)


def main() -> None:
    """Entry point of the `transdiff` command."""
    with reader_may_leave():
        app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"transdiff_pipelines {version('transdiff_pipelines')}")
        raise typer.Exit()


@app.callback()
def _root(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...
