"""Exponential moving average of the weights: diffusers' `EMAModel`, kept by name and in safetensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's slice of a tensor that is split over processes, sharing its memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class WeightAverage:
    """The average of a module's trained parameters; frozen ones do not change and need none.

    If parameters are split over processes, each process averages its own slices.

    Args:
        module: the module, unwrapped from DDP.
        decay: the final decay.
        warmup: let the decay rise as (1 + step) / (10 + step) to the final one.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.module = module
        trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.names = list(trained)
        self.parameters = [local(value.detach()).requires_grad_() for value in trained.values()]
        self.average = EMAModel(
            self.parameters,
            decay=decay,
            min_decay=0.0 if warmup else decay,
            update_after_step=-1,  # otherwise the first update would only copy the weights
            foreach=True,
        )

    def update(self) -> None:
        """Update the average with the module's weights, after an optimiser step."""
        self.average.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with averaged weights and in evaluation mode, for the length of a `with` block."""
        training = self.module.training
        self.average.store(self.parameters)
        self.average.copy_to(self.parameters)
        self.module.eval()
        try:
            yield self.module
        finally:
            self.average.restore(self.parameters)
            self.module.train(training)

    def save(self, path: Path, averaged: nn.Module) -> None:
        """Write the averages, which are the parameters of the whole module `averaged`, and the number of updates."""
        state = averaged.state_dict()
        tensors = {name: state[name].contiguous() for name in self.names}
        save_file(tensors, path, metadata={"step": str(self.average.optimization_step)})

    def load(self, path: Path, part_of: Callable[[str, Tensor], Tensor]) -> None:
        """Read a file of `save`. `part_of` returns what this process keeps of a whole tensor (`Engine.part_of`)."""
        with safe_open(path, framework="pt") as file:
            for name, shadow in zip(self.names, self.average.shadow_params, strict=True):
                shadow.copy_(part_of(name, file.get_tensor(name)))
            self.average.optimization_step = int(file.metadata()["step"])
