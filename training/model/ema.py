"""Exponential moving average of the weights: diffusers' `EMAModel`, kept by name and in safetensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.distributed.sharding import from_slices, local, sliced_like


class WeightAverage:
    """The average of a module's trained parameters; frozen ones are their own average. Of parameters that are split
    over processes each process averages its slices.

    Args:
        module: the module, unwrapped from DDP.
        decay: the final decay.
        warmup: let the decay rise as (1 + step) / (10 + step) to the final one.
    """

    def __init__(self, module: nn.Module, decay: float, warmup: bool = True) -> None:
        self.module = module
        self.trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.names = list(self.trained)
        self.parameters = [local(value.detach()).requires_grad_() for value in self.trained.values()]
        self.average = EMAModel(
            self.parameters,
            decay=decay,
            min_decay=0.0 if warmup else decay,
            update_after_step=-1,  # else the first update would be a copy
            foreach=True,
        )

    def update(self) -> None:
        """Take in the module's weights after an optimiser step."""
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

    def tensors(self) -> dict[str, Tensor]:
        """The averages by the names of their parameters, split over processes where those are."""
        pairs = zip(self.trained.items(), self.average.shadow_params, strict=True)
        return {name: from_slices(shadow, value) for (name, value), shadow in pairs}

    def save(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Write `tensors`, whole, with the number of updates."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path, metadata={"step": str(self.average.optimization_step)})

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for (name, value), shadow in zip(self.trained.items(), self.average.shadow_params, strict=True):
                shadow.copy_(local(sliced_like(file.get_tensor(name), value)))
            self.average.optimization_step = int(file.metadata()["step"])
