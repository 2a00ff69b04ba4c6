"""Weights split over processes with PyTorch's FSDP2, and whole again where a file or a picture is made of them.

Each process keeps a slice of every weight, of its gradient, of the optimiser's and of the running average; a block's
weights are gathered while the block runs. Checkpoints hold whole tensors, the same files as those of one process.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


if TYPE_CHECKING:
    from training.model.build import TrainingModel


def shard(module: TrainingModel, device: torch.device, num_processes: int) -> None:
    """Split the weights of `module`, whole and equal on all processes, in place."""
    module.to(device)
    mesh = init_device_mesh(device.type, (num_processes,))
    encoder, decoder = module.condition_encoder, module.transformer
    # the condition is projected once for all images and timesteps, outside the blocks that these layers belong to
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


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from all processes, which call this together; others are returned as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors: all processes call this together, those that `keep` have the result, of split ones on the CPU."""
    gathered = {}
    for name, tensor in tensors.items():
        value = whole(tensor.detach())
        if keep:
            gathered[name] = value.cpu() if isinstance(tensor, DTensor) else value
    return gathered


def local(tensor: Tensor) -> Tensor:
    """This process's slice, of the same storage; a tensor that is not split is its own slice."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sliced_like(value: Tensor, example: Tensor) -> Tensor:
    """A whole tensor, equal on all processes, split as `example` is."""
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(value.to(example.device), example.device_mesh, example.placements, src_data_rank=None)


def from_slices(value: Tensor, example: Tensor) -> Tensor:
    """The split tensor of which `value` is this process's slice, `example` being split the same way."""
    if not isinstance(example, DTensor):
        return value
    return DTensor.from_local(
        value, example.device_mesh, example.placements, shape=example.shape, stride=example.stride()
    )


def keep_optimizer_files_whole(optimizer: torch.optim.Optimizer) -> None:
    """Make the optimiser's state dictionary, written and read, that of one process; all processes call it together."""

    def gathered(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        rows = {key: {name: whole(value) for name, value in row.items()} for key, row in state["state"].items()}
        return state | {"state": rows}

    def split(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        rows = dict(state["state"])
        for number, parameter in zip(numbers, parameters, strict=True):
            rows[number] = {
                name: sliced_like(value, parameter) if value.shape == parameter.shape else value
                for name, value in rows.get(number, {}).items()
            }
        return state | {"state": {number: row for number, row in rows.items() if row}}

    optimizer.register_state_dict_post_hook(gathered)
    optimizer.register_load_state_dict_pre_hook(split)
