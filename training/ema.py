"""Exponential moving average of the weights: diffusers' `EMAModel`, kept by name and in safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers.training_utils import EMAModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


class WeightAverage:
    """The average of a module's parameters; its decay warms up as (1 + step) / (10 + step) to `decay`.

    Args:
        module: the module, unwrapped from DDP.
        decay: the final decay.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module = module
        self.average = EMAModel(module.parameters(), decay=decay, foreach=True)

    def update(self) -> None:
        """Take in the module's weights after an optimiser step."""
        self.average.step(self.module.parameters())

    @contextmanager
    def applied(self) -> Iterator[nn.Module]:
        """The module with averaged weights and in evaluation mode, for the length of a `with` block."""
        training = self.module.training
        self.average.store(self.module.parameters())
        self.average.copy_to(self.module.parameters())
        self.module.eval()
        try:
            yield self.module
        finally:
            self.average.restore(self.module.parameters())
            self.module.train(training)

    def save(self, path: Path) -> None:
        names = (name for name, _ in self.module.named_parameters())
        tensors = {name: tensor.contiguous() for name, tensor in zip(names, self.average.shadow_params, strict=True)}
        save_file(tensors, path, metadata={"step": str(self.average.optimization_step)})

    def load(self, path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            for (name, _), shadow in zip(self.module.named_parameters(), self.average.shadow_params, strict=True):
                shadow.copy_(file.get_tensor(name))
            self.average.optimization_step = int(file.metadata()["step"])
