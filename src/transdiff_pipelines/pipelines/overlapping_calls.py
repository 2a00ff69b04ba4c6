"""Calls that overlap, from several threads or in a callback: what each has for itself, and what cannot be shared."""

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn


@dataclass(frozen=True, eq=False)
class _Running:
    """A call that has begun and not ended; `held` names what keeps its state in the models."""

    thread: int
    models: Sequence[nn.Module]
    scheduler: SchedulerMixin
    held: str | None

    def check_overlap(self, other: "_Running") -> None:
        """Raise RuntimeError where both would write their state into the same models."""
        held = self.held or other.held
        shared = any(mine is theirs for mine in self.models for theirs in other.models)
        # Within one thread the inner call has ended before the outer one goes on.
        if held and shared and self.thread != other.thread:
            raise RuntimeError(
                f"this call overlaps with another one on the same models, in which {held} keeps the state of a single "
                "call; make one call after the other (with a threading.Lock around them), or load a pipeline for each "
                "thread"
            )


_RUNNING: list[_Running] = []
_LOCK = threading.Lock()


@contextmanager
def admitted(models: Sequence[nn.Module], scheduler: SchedulerMixin, held: str | None) -> Iterator[SchedulerMixin]:
    """Let a call begin, and give it a scheduler to itself, because a scheduler holds the state of a run.

    A call that overlaps with no other one on this scheduler gets the object itself, so that its time grid can be read
    when the call has ended, as in diffusers; any other call gets a copy.

    Args:
        models: what the call runs.
        held: what in the models keeps the state of a call, such as a cache; None: nothing does.

    Raises:
        RuntimeError: another thread's call is running on one of the models, and either of the two has such a state.
    """
    with _LOCK:
        call = _Running(threading.get_ident(), models, scheduler, held)
        for other in _RUNNING:
            call.check_overlap(other)
        if any(other.scheduler is scheduler for other in _RUNNING):
            call = _Running(call.thread, models, _copy_in_use(scheduler), held)
        _RUNNING.append(call)
    try:
        yield call.scheduler
    finally:
        with _LOCK:
            _RUNNING.remove(call)


def _copy_in_use(scheduler: SchedulerMixin) -> SchedulerMixin:
    """A deep copy, although another thread is changing the scheduler; `set_timesteps` then makes its state anew."""
    # The attributes are taken all at once: one by one, the other thread could add one in between.
    twin = copy.copy(scheduler)
    vars(twin).update(copy.deepcopy(vars(twin)))
    return twin
