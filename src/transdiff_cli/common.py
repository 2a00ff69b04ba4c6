"""What the subcommands share: options, lists of numbers, errors in one line, settings in words."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO

import typer
from typer.core import TyperCommand


DType = Literal["float32", "bfloat16", "float16"]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# The names are the keys of `sources.BUNDLED`, which takes seconds to import.
MODEL_HELP = "Folder or Hub repository of a pipeline, or a model of the package: digits, digits-flow-map, emoji."


class Command(TyperCommand):
    """A subcommand whose options mean what they look like."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, but for several values after an option that takes one at a time.

        `generate 3 --guidance-scale 1 2 3 4` would be a guidance of 1 and the classes 3, 2, 3, 4.
        """
        # By their names, the options that may be given several times, and whether commas are an alternative.
        repeatable = {
            name: "," in str(option.metavar)
            for option in self.params
            if getattr(option, "multiple", False)
            for name in option.opts
        }
        groups = self._arguments_by_place(args)
        for (name, value), arguments in groups:
            numbers = [value.split(",")[0], *arguments]
            looks_like_a_list = len(arguments) > 1 and all(map(_is_number, numbers))
            if name in repeatable and (looks_like_a_list or len(groups) > 1):
                values = ",".join(part.strip(",") for part in (value, *arguments))
                several = f"with commas, {name} {values}"
                if not repeatable[name]:
                    several = "with the option before each, " + " ".join(
                        f"{name} {part}" for part in (value, *arguments)
                    )
                ctx.fail(
                    f"{' '.join(arguments)} after {name} {value} would be arguments of their own, not values of the "
                    f"option. Write several values {several}, and the arguments together, before the options"
                )
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run, with `~` expanded in paths: no shell does that in `--output=~/name`."""
        for parameter in self.params:
            name, value = parameter.name, ctx.params.get(parameter.name)
            # typer 0.20 makes Paths of the strings later; its parameters have click's types.
            kind = getattr(getattr(parameter, "type", None), "name", "")
            if isinstance(value, Path) or (isinstance(value, str) and kind in ("path", "file", "directory")):
                ctx.params[name] = type(value)(os.path.expanduser(value))
        return super().invoke(ctx)

    def _arguments_by_place(self, args: list[str]) -> list[tuple[tuple[str, str], list[str]]]:
        """Arguments that are no option's, grouped by the option and value they follow; by "" first and after `--`."""
        takes_value = {
            name: not getattr(parameter, "is_flag", False)
            for parameter in self.params
            for name in (*parameter.opts, *parameter.secondary_opts)
        }
        option, places, rest = ("", ""), [], iter(args)
        for argument in rest:
            name, equals, value = argument.partition("=")
            if argument == "--":
                places += [(("", ""), left) for left in rest]
            elif name in takes_value:
                option = (name, value if equals or not takes_value[name] else next(rest, ""))
            else:
                places.append((option, argument))
        return [(place, [argument for _, argument in group]) for place, group in groupby(places, lambda pair: pair[0])]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


@contextmanager
def one_line_errors(debug: bool) -> Iterator[None]:
    """Print an exception as one line and exit with 1; with `debug` let it through."""
    with reader_may_leave():
        try:
            yield
        except Exception as error:
            if debug:
                raise
            message = " ".join(str(error).split())
            # Errors of these types name value, expectation and remedy. Any other was not foreseen: its type is shown.
            if not message or not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
                message = f"{type(error).__name__}: {message} (--debug shows the traceback)"
            typer.echo(f"error: {message}", err=True)
            raise typer.Exit(1) from error


class _Stream:
    """A stream of text; what is written after its reader has left goes nowhere."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._to_nowhere_without_reader():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._to_nowhere_without_reader():
            self._stream.flush()

    @contextmanager
    def _to_nowhere_without_reader(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # the text stays in the stream's buffer, from where it is written once more
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()


@contextmanager
def reader_may_leave() -> Iterator[None]:
    """Go on when the program that reads this one's output or errors has closed them, as in `transdiff info | head -1`.

    The lines are lost, and neither the images that are being drawn nor the model that is being trained. Without this
    Python ends the program with an error, and reports it once more when it flushes at the end.
    """
    streams = sys.stdout, sys.stderr  # None where it was closed from the start
    guarded = [stream and _Stream(stream) for stream in streams]
    sys.stdout, sys.stderr = guarded
    try:
        yield
    finally:
        for stream in filter(None, guarded):
            stream.flush()
        sys.stdout, sys.stderr = streams


def parse_scales(text: str) -> list[float]:
    """Numbers of a list such as `1,1.5,2`, or the one number that there is.

    Raises:
        ValueError: something in the list is no number.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"{text!r} is not a number, nor numbers with commas between them such as 1,1.5,2,2.5"
        ) from error


def scales_in_words(
    guidance: float | Sequence[float] | None, drift_scale: float | None, diffusion_scale: float | None
) -> str:
    """Guidance, none being 1, and the scales of an SDE sampler if that is what it is."""
    shown = 1.0 if guidance is None else list(guidance) if isinstance(guidance, Sequence) else guidance
    if drift_scale is None:
        return f"guidance {shown}"
    return f"guidance {shown}, drift scale {drift_scale}, diffusion scale {diffusion_scale}"
