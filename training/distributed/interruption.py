"""Why a run ends before its time: bad steps, or Ctrl-C and SIGTERM, heeded where nothing is lost."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TrainingStopped(RuntimeError):
    """Training cannot go on: too many bad steps in a row."""


class TrainingInterrupted(RuntimeError):
    """Someone wanted the run to stop; a checkpoint was saved."""


class StopRequest:
    """Whether someone wants the run to stop; a second signal ends the process at once.

    Attributes:
        made: whether a signal has come.
    """

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Wait for signals for the length of a `with` block; in other threads than the main one Python cannot."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.made:
            raise KeyboardInterrupt
        self.made = True
