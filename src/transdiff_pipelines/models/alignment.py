"""Weights at memory addresses that make matrix products round the same way every time."""

import torch
from torch import nn


VECTOR_BYTES = 64


@torch.no_grad()
def align_weights(module: nn.Module) -> None:
    """Move CPU weights that do not start at a multiple of 64 bytes to memory that does.

    Tensors of a memory-mapped safetensors file start wherever its header ends, and matrix products of unaligned
    operands sum in another order: without this, a loaded model agrees with the saved one to rounding only.
    """
    for parameter in module.parameters():
        if parameter.device.type == "cpu" and type(parameter.data) is torch.Tensor and _is_unaligned(parameter):
            parameter.data = parameter.data.clone()


def _is_unaligned(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and tensor.data_ptr() % VECTOR_BYTES != 0
