"""Engines: a model and its AdamW in training, whole on every process or split over all of them.

The training loop calls `backward` for every batch and `step` for every optimiser step, and does not know what is
split. There are three engines: `ReplicatedEngine` here (one process, or several with DDP), `Fsdp2Engine` and
`Zero2Engine`. What they give for a checkpoint are whole tensors, the same for all three.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor

from training.model.build import TrainingModel
from training.model.ema import local
from training.model.optimizer import build_optimizer
from training.settings.config import TrainConfig


@dataclass(frozen=True)
class Step:
    """The outcome of an optimiser step.

    Attributes:
        grad_norm: norm of the gradients of all processes before clipping.
        stepped: whether the weights changed. They do not if the loss or the gradients were not finite.
        good: False if that is a fault. Under fp16 it is none if the scaler skipped the step to lower its scale.
        beside: the numbers that `Engine.step` was given to read.
    """

    grad_norm: float
    stepped: bool
    good: bool
    beside: list[float]


class Engine(ABC):
    """A model and its optimiser in training; all processes call each method together.

    Args:
        module: whole, in float32 and equal on all processes; it is trained in place.
        config: of the run.
        accelerator: the run's processes, precision and accumulation.

    Attributes:
        module: the model. With FSDP2 its parameters are slices of the whole ones.
        model: what a batch is passed to, `model(**batch)`, before `backward`.
        template: the model with the shapes of whole weights; if `module` is split, its weights have no numbers.
        saved: names of the weights that a checkpoint keeps: all, or in a LoRA run the adapters alone.
    """

    model: Any
    optimizer: Any

    def __init__(self, module: TrainingModel, config: TrainConfig, accelerator: Accelerator) -> None:
        self.module = self.template = module
        self.config, self.accelerator = config, accelerator
        trained = [name for name, value in module.named_parameters() if value.requires_grad]
        self.saved = list(module.state_dict()) if config.lora.rank is None else trained

    def set_learning_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def accumulating(self) -> AbstractContextManager[None]:
        """Around forward and `backward` of a batch; of the batches of a step the last one exchanges the gradients."""
        return self.accelerator.accumulate(self.model)

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss, divided by the number of accumulated batches.

        A loss that is not finite turns all gradients into nan, so that no process takes the step.
        """

    @abstractmethod
    def step(self, beside: Tensor | None = None) -> Step:
        """Clip the gradients, step unless they are not finite, and clear them.

        Whether to step has to be known here, because the optimiser, the running average and the count of bad steps
        depend on it. So the program waits for the device once in a step: when it reads the norm, after all of the
        forward and backward work was queued, and with it `beside` `(n,)`, numbers that the caller wants to know.
        """

    def whole_weights(self) -> dict[str, Tensor]:
        """The whole weights with the names in `saved`, on the main process; other processes may get none."""
        state = self.module.state_dict()
        return {name: state[name] for name in self.saved}

    def whole_networks(self) -> TrainingModel:
        """The model with all its numbers on the main process. If it is split this is a copy, which the other processes
        get without numbers.
        """
        return self.module

    @abstractmethod
    def whole_optimizer(self) -> dict[str, Any]:
        """The optimiser's state dictionary as one process has it, on the main process."""

    def load(self, weights: Mapping[str, Tensor], optimizer: dict[str, Any]) -> None:
        """Take in what `whole_weights` and `whole_optimizer` of any engine gave, or this process's part of it."""
        state = self.module.state_dict()
        for name in self.saved:
            local(state[name]).copy_(self.part_of(name, weights[name]))
        self.load_optimizer(optimizer)

    @abstractmethod
    def load_optimizer(self, state: dict[str, Any]) -> None:
        """The optimiser's part of `load`, once the weights are there."""

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        """What this process keeps of a whole tensor that has the name and shape of a weight."""
        return whole

    def close(self) -> None:
        """Let go of what exchanges gradients, before the process group is taken down; `module` stays.

        DDP's reducer holds the group too, and PyTorch frees the reducer with the interpreter's lock held. If the group
        went with it, both could wait forever: the group for its thread to end, and under Gloo that thread for the
        lock, as long as it has tensors of the last exchange to give back.
        """
        self.model = self.module
        self.accelerator.free_memory()


class ReplicatedEngine(Engine):
    """Every process has the whole state. accelerate averages the gradients (DDP) and scales the loss under fp16."""

    def __init__(self, module: TrainingModel, config: TrainConfig, accelerator: Accelerator) -> None:
        super().__init__(module, config, accelerator)
        self.model = self.spread()
        self.optimizer = accelerator.prepare(build_optimizer(module, config.optimizer))

    def spread(self) -> Any:
        """Put the weights on their devices; returns what a batch is passed to."""
        return self.accelerator.prepare(self.module)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(spoiled_if_bad(loss))

    def step(self, beside: Tensor | None = None) -> Step:
        """As in `Engine`. Under fp16 a gradient that overflows is normal: the scaler skips that step itself and lowers
        its scale. Only when the scale has fallen below 1 does an overflow count as bad. The scaler reads its scale and
        waits too, but right after the norm, when the device has hardly anything left to do.
        """
        numbers = self.clip().reshape(1)
        norm, *values = (numbers if beside is None else torch.cat([numbers, beside])).tolist()
        scaler, finite = self.accelerator.scaler, math.isfinite(norm)
        judged_by_scaler = scaler is not None and scaler.get_scale() >= 1
        if finite or scaler is not None:
            self.optimizer.step()
        # The scaler skips other optimisers, but calls fused AdamW, which then leaves the weights alone by itself. So
        # the norm has to be asked as well.
        stepped = finite and not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        return Step(norm, stepped, good=finite or judged_by_scaler, beside=values)

    def clip(self) -> Tensor:
        """Clip the gradients; returns their norm before clipping, a scalar on the device."""
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.config.optimizer.max_grad_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole_optimizer(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_optimizer(self, state: dict[str, Any]) -> None:
        # AdamW would keep and change these very tensors, which may be views of the checkpoint's file.
        self.optimizer.load_state_dict(copy.deepcopy(state))


def spoiled_if_bad(loss: Tensor) -> Tensor:
    """The loss, or if it is not finite one whose gradients are nan. Those of an infinite loss could be finite."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, float("nan"))
