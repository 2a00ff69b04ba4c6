"""Parts of a long measurement within a time budget: each is left out, ends, fails or is cut off by itself."""

import contextlib
import gc
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class Skip(Exception):
    """Raised by a part that cannot be measured here; the message says what is missing."""


class CutOff(BaseException):
    """The time is up. No `Exception`, so that what a library catches and goes on from does not catch this."""


class Stopped(BaseException):
    """The program was asked to end, by SIGTERM or Ctrl-C."""


@dataclass(frozen=True)
class Part:
    """A measurement with a result of its own.

    Attributes:
        name: in the command line and in the results.
        question: what it answers, in words.
        seconds: what it takes on a GPU such as an H100, first compilations included: an estimate.
        measure: called with what the parts share; returns what goes to JSON.
        table: of what `measure` has returned, in Markdown.
        rehearsed: False if another part differs from it in its sizes alone, so that a rehearsal can do without.
    """

    name: str
    question: str
    seconds: float
    measure: Callable[[Any], dict[str, Any]]
    table: Callable[[dict[str, Any]], str]
    rehearsed: bool = True


class Deadline:
    """The end of a budget of `minutes` that begins when this is made."""

    def __init__(self, minutes: float):
        self.end = time.monotonic() + 60 * minutes

    @property
    def left(self) -> float:
        """Seconds; never below 0."""
        return max(0.0, self.end - time.monotonic())


@contextmanager
def cut_off_after(seconds: float) -> Iterator[None]:
    """Raise `CutOff` in the block when the time is up; again a little later, where it got lost in a destructor."""
    if not hasattr(signal, "setitimer"):  # Windows
        yield
        return

    def end(*_: Any) -> None:
        raise CutOff

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise `Stopped` in the block, once: what follows is quick, and shall not be interrupted."""

    def stop(*_: Any) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Stopped

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_part(part: Part, shared: Any, deadline: Deadline, estimate: float) -> dict[str, Any]:
    """The part's outcome: a `status`, the `seconds` it took, and its `result` or the `reason` why there is none.

    Raises:
        Stopped: as it comes, from `stopped_by_signals`.
    """
    if estimate > deadline.left:
        reason = f"it takes about {estimate:.0f} s, and {deadline.left:.0f} s are left"
        return {"status": "skipped", "seconds": 0.0, "reason": reason}
    start = time.perf_counter()
    outcome: dict[str, Any]
    try:
        with cut_off_after(deadline.left):
            outcome = {"status": "done", "result": part.measure(shared)}
    except Skip as skip:
        outcome = {"status": "skipped", "reason": str(skip)}
    except CutOff:
        outcome = {"status": "cut off", "reason": "the time was up"}
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        outcome = {"status": "failed", "reason": in_short(error), "traceback": text}
    clean_up()
    return outcome | {"seconds": time.perf_counter() - start}


def clean_up() -> None:
    """Leave nothing of a part to the next: compiled code, and memory of the device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        # What is wrong with the device shows by itself, when the next part uses it.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


def in_short(error: BaseException, length: int = 200) -> str:
    """The kind of an error and the beginning of its first line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:length]


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns, or the `reason` why it does not: for one of several ways that not every machine has."""
    try:
        return measure()
    except Exception as error:
        return {"reason": str(error) if isinstance(error, Skip) else in_short(error)}
