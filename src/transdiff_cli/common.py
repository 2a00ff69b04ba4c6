"""What the subcommands share: options, errors in one line, settings in words."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Literal

import typer


DType = Literal["float32", "bfloat16", "float16"]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Print an exception as one line and exit with 1; with `debug` let it through."""
    try:
        yield
    except Exception as error:
        if debug:
            raise
        message = " ".join(str(error).split())
        # These name value, expectation and remedy; anything else was not foreseen, so its type helps.
        if not message or not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            message = f"{type(error).__name__}: {message} (--debug shows the traceback)"
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(1) from error


def scales_in_words(
    guidance: float | Sequence[float] | None, drift_scale: float | None, diffusion_scale: float | None
) -> str:
    """Guidance, none being 1, and the scales of an SDE sampler if that is what it is."""
    shown = 1.0 if guidance is None else list(guidance) if isinstance(guidance, Sequence) else guidance
    if drift_scale is None:
        return f"guidance {shown}"
    return f"guidance {shown}, drift scale {drift_scale}, diffusion scale {diffusion_scale}"
