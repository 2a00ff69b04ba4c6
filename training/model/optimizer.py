"""Optimisers: AdamW in several forms, and Muon for the matrices of the blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.settings.config import ConfigError, OptimizerConfig


if TYPE_CHECKING:
    from .build import TrainingModel


class MuonAndAdamW(torch.optim.Optimizer):
    """PyTorch's Muon for the matrices of the transformer blocks and AdamW for all else, as one optimiser.

    Muon orthogonalises its updates and gives them the size of AdamW's, so that both take one learning rate. Its
    matrices are whole ones: it goes with several processes, but not with a model that is split over them.

    Args:
        groups: as `parameter_groups` makes them.
        matrices: parameters for Muon, all of them in these groups.
        arguments: AdamW's.
    """

    def __init__(self, groups: list[dict[str, Any]], matrices: list[nn.Parameter], arguments: dict[str, Any]) -> None:
        chosen = {id(matrix) for matrix in matrices}
        self.parts: list[torch.optim.Optimizer] = []
        for group in groups:
            decay = group["weight_decay"]
            for_muon = [value for value in group["params"] if id(value) in chosen]
            others = [value for value in group["params"] if id(value) not in chosen]
            if for_muon:
                muon = torch.optim.Muon(
                    for_muon, lr=arguments["lr"], weight_decay=decay, adjust_lr_fn="match_rms_adamw"
                )
                self.parts.append(muon)
            if others:
                self.parts.append(torch.optim.AdamW(others, weight_decay=decay, **arguments))
        super().__init__([part.param_groups[0] for part in self.parts], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step of each part, with the groups and the state of this optimiser, which loading replaces."""
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()


def parameter_groups(built: TrainingModel, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: no weight decay on 1-D tensors, nor on anything in the diffusion decoder."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.startswith("transformer.")
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(built: TrainingModel, optimizer: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimiser of the kind asked for.

    Raises:
        ConfigError: if 8-bit AdamW is asked for and bitsandbytes is not installed, or Muon and PyTorch has none.
    """
    groups = parameter_groups(built, optimizer.weight_decay)
    arguments: dict[str, Any] = {"lr": optimizer.learning_rate, "betas": (optimizer.beta1, optimizer.beta2)}
    if optimizer.kind == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ConfigError(f"optimizer.kind=muon needs PyTorch 2.9 or later, and this is {torch.__version__}")
        matrices = [
            value for name, value in built.named_parameters() if ".transformer_blocks." in name and value.ndim == 2
        ]
        return MuonAndAdamW(groups, matrices, arguments)
    if optimizer.kind == "8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ConfigError("optimizer.kind=8bit needs bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit(groups, **arguments)
    return torch.optim.AdamW(groups, fused=True if optimizer.kind == "fused" else None, **arguments)
