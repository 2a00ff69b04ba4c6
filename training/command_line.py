"""What the commands share: types of their options' values, and errors in one line."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from training.data.errors import DataError
from training.settings.config import ConfigError
from transdiff_cli.common import reader_may_leave


@contextmanager
def one_line_errors(program: str, *kinds: type[Exception]) -> Iterator[None]:
    """Print an error of the user's settings, data or disk as one line, and exit with 2; let others through.

    A reader of the output that leaves, as in `| head -1`, is no error, and ends no work.

    Args:
        program: how the line begins.
        kinds: of errors, besides ConfigError, DataError and OSError.
    """
    expected: tuple[type[Exception], ...] = (ConfigError, DataError, OSError, *kinds)
    with reader_may_leave():
        try:
            yield
        except expected as error:
            print(f"{program}: {error}", file=sys.stderr)
            raise SystemExit(2) from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """A finite number greater than 0."""
    return _number(text, "greater than 0", lambda number: number > 0)


def not_negative(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, "of at least 0", lambda number: number >= 0)


def _number(text: str, range_in_words: str, is_in_range: Callable[[float], bool]) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or not is_in_range(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number {range_in_words}")
    return number


def seed(text: str) -> int:
    """A whole number that every random generator takes, 0 to 2^32 - 1."""
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 0 to {2**32 - 1}")
    return int(text)
