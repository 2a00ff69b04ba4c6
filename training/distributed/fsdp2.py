"""PyTorch's FSDP2: the weights are split over the processes, and made whole again for checkpoints and previews.

Each process keeps a slice of every weight, of its gradient, of the optimiser's and of the running average; a block's
weights are gathered while the block runs. Checkpoints hold whole tensors, the same files as those of one process.

`torch.distributed.checkpoint.state_dict` is not used. It names the optimiser's rows by parameter, where our files
number them as `optimizer.state_dict()` does, and it makes an AdamW that has not stepped yet take a step with gradients
of zero, which AdamW then counts.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from training.model.build import TrainingModel
from training.model.ema import local

from .engine import ReplicatedEngine


class Fsdp2Engine(ReplicatedEngine):
    """Weights, gradients and optimiser are split. Stepping through accelerate is the same as in `ReplicatedEngine`."""

    def spread(self) -> TrainingModel:
        self.template = empty_copy(self.module)
        shard(self.module, self.accelerator.device, self.accelerator.num_processes)
        self.examples = self.module.state_dict()  # of each weight it tells how it is split
        return self.module

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the main process's memory. The other processes take part in gathering, and get none."""
        whole = {}
        for name, tensor in tensors.items():
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.accelerator.is_main_process:
                whole[name] = value.cpu()
        return whole

    def whole_weights(self) -> dict[str, Tensor]:
        return self.gathered(super().whole_weights())

    def whole_networks(self) -> TrainingModel:
        state = self.gathered(self.module.state_dict())
        if not state:
            return self.template
        networks = copy.deepcopy(self.template)
        networks.load_state_dict(state, assign=True)
        return networks.to(self.accelerator.device)

    def whole_optimizer(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        return state | {"state": {number: self.gathered(row) for number, row in state["state"].items()}}

    def load_optimizer(self, state: dict[str, Any]) -> None:
        parameters = [value for group in self.optimizer.param_groups for value in group["params"]]
        rows: dict[int, dict[str, Tensor]] = {}
        for number, row in state["state"].items():
            whole = parameters[
                number
            ]  # AdamW's moments have its shape; the number of steps, which is not split, has not
            rows[number] = {
                name: sliced_like(value, whole) if value.shape == whole.shape else value.clone()
                for name, value in row.items()
            }
        self.optimizer.load_state_dict(state | {"state": rows})

    def part_of(self, name: str, whole: Tensor) -> Tensor:
        return local(sliced_like(whole, self.examples[name]))


def shard(module: TrainingModel, device: torch.device, num_processes: int) -> None:
    """Split the weights of `module`, whole and equal on all processes, in place."""
    module.to(device)
    mesh = init_device_mesh(device.type, (num_processes,))
    encoder, decoder = module.condition_encoder, module.transformer
    # The decoder's blocks own these layers, but the loss calls them before the blocks run, once for all images and
    # timesteps. So they are gathered as a unit of their own.
    projections = [layer for attention in decoder.cross_attentions for layer in (attention.to_k, attention.to_v)]
    blocks: list[Any] = [*encoder.transformer_blocks, *decoder.transformer_blocks]
    for unit in (projections, *blocks, module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)


def empty_copy(module: TrainingModel) -> TrainingModel:
    """A copy whose parameters have shapes but no numbers."""
    shapes: dict[int, Any] = {
        id(value): nn.Parameter(torch.empty_like(value, device="meta"), value.requires_grad)
        for value in module.parameters()
    }
    return copy.deepcopy(module, shapes)


def sliced_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, split as `example` is."""
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)
