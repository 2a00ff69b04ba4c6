"""What ends a run early: too many bad steps, Ctrl-C, or SIGTERM. Signals are noted, and obeyed after a whole step."""

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
    """A signal asked the run to stop, and a checkpoint was saved."""


class StopRequest:
    """Notes that a signal asked the run to stop. A second signal ends the process at once.

    Attributes:
        made: whether a signal has come.
    """

    def __init__(self) -> None:
        self.made = False

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Note signals inside the `with` block; outside the main thread, where Python cannot, this does nothing."""
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
