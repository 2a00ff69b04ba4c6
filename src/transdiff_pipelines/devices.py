"""The device that commands take where none is named."""

import torch


def best_device() -> torch.device:
    """The machine's accelerator, such as `cuda` or `mps`, if it has one that PyTorch can use, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
