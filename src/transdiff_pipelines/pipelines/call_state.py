"""The state of a running call: what its callback may read and set as properties of the pipeline.

One pipeline serves several threads, so that nothing of a call is kept in the pipeline itself.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..models import ARConditionEncoder, TransDiffTransformer2DModel
from .checks import CallSettings
from .hooks import hooks_freed, state_held_by
from .overlapping_calls import admitted


@dataclass
class CallState:
    """What a call changes while it runs; its callback sees it as properties of the pipeline.

    Attributes:
        scheduler: the one that this call steps.
        guidance_scale: that of the image being made. A callback may change it, for this image and for those after
            it that were given the same scale.
        num_timesteps: denoising steps of the whole call, as far as known.
        steps_taken: those of the images that are finished.
        images_left: images still to be made, the one being made counted.
        current_timestep, current_ar_step: where the call is; None outside its loops.
        dtype: the transformer's, while it denoises: to look it up, diffusers walks through all of its modules.
        interrupt: whether the call shall end with what is there.
    """

    scheduler: SchedulerMixin
    attention_kwargs: dict[str, Any] | None = None
    guidance_scale: float = 1.0
    num_timesteps: int = 0
    steps_taken: int = 0
    images_left: int = 1
    current_timestep: torch.Tensor | None = None
    current_ar_step: int | None = None
    dtype: torch.dtype | None = None
    interrupt: bool = False


# The calls that run in this thread, by the id of their pipeline. There may be several, because a callback may call
# another pipeline.
_CALLS: ContextVar[Mapping[int, CallState]] = ContextVar("transdiff_calls")


def _of_call(name: str) -> property:
    """A part of the call's state that callbacks may set."""
    return property(
        lambda pipe: getattr(pipe._call, name),
        lambda pipe, value: setattr(pipe._call, name, value),
    )


class CallStateMixin:
    """The state of the call that runs in this thread, and beginning one."""

    condition_encoder: ARConditionEncoder
    transformer: TransDiffTransformer2DModel
    vae: Any

    # The call that began last. Outside of a call the properties below show it, as those of diffusers' pipelines
    # do, and another thread ends it by setting `_interrupt`.
    _last_call: CallState

    @property
    def _call(self) -> CallState:
        """The state of the call that runs in this thread, or else of the last one."""
        return _CALLS.get({}).get(id(self), self._last_call)

    _guidance_scale = _of_call("guidance_scale")
    _interrupt = _of_call("interrupt")

    @property
    def scheduler(self) -> SchedulerMixin:
        """The scheduler; for the callback of a call the one that it steps, a copy if other calls run meanwhile."""
        call = _CALLS.get({}).get(id(self))
        return self.__dict__["scheduler"] if call is None else call.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: SchedulerMixin) -> None:
        self.__dict__["scheduler"] = scheduler

    @property
    def guidance_scale(self) -> float:
        """Guidance of the image being made."""
        return self._call.guidance_scale

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """What the running call hands to the models' `attention_kwargs`."""
        return self._call.attention_kwargs

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the image being made needs the unconditional branch."""
        return self._call.guidance_scale != 1.0

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the whole call, over all images of the sequence: callbacks count up to it.

        Where an edit takes fewer steps for its last image, that is known when the last image begins.
        """
        return self._call.num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the step being taken; None outside the loop."""
        return self._call.current_timestep

    @property
    def current_ar_step(self) -> int | None:
        """Which image of the AR sequence is being made, 0..N-1; None outside the loop."""
        return self._call.current_ar_step

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to end the call with what is there."""
        return self._call.interrupt

    @contextmanager
    def _begin_call(self, settings: CallSettings) -> Iterator[CallState]:
        """The state of a call, its own for as long as it runs; at its end offloaded weights are given back.

        Raises:
            RuntimeError: it overlaps with a call that it cannot share the models with.
        """
        models = [model for model in (self.condition_encoder, self.transformer, self.vae) if model is not None]
        held = state_held_by(models, settings.attention_kwargs)
        with admitted(models, self.scheduler, held) as scheduler, hooks_freed(self):
            call = self._last_call = CallState(scheduler, settings.attention_kwargs)
            token = _CALLS.set({**_CALLS.get({}), id(self): call})
            try:
                yield call
            finally:
                _CALLS.reset(token)
                # What is not reset here can be read when the call has ended.
                call.current_ar_step = call.current_timestep = call.attention_kwargs = None
