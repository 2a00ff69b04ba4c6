"""What a configuration would train, without training: `python -m training.train --config FILE --dry-run`.

Operations and activations are counted on a copy of the model whose tensors have shapes but no numbers, so that a
model of any size can be described without computing with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from training.trainer import Trainer


OPTIMIZER_BYTES = {"adamw": 8, "fused": 8, "8bit": 2}
"""Bytes of AdamW's two averages per trained parameter."""

ATEN = torch.ops.aten
CPU_ATTENTION = {
    ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **options: sdpa_flop_count(q, k, v),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *rest, **options: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}
"""The attention kernels that PyTorch's counter leaves out."""


def describe(trainer: Trainer) -> str:
    """Sizes, cost, memory, schedule and the first batch of a run that was built but not started."""
    batch = trainer.taught(trainer.to_latents(trainer.batches[0]))
    flops, activations = measure(trainer, batch)
    images = trainer.config.data.batch_size * trainer.batches.group_size
    return "\n".join(
        [
            "dry run: nothing is trained or written",
            *parameters(trainer.module),
            f"cost: {flops / images / 1e9:,.3g} GFLOPs per image, forward and backward"
            + (", without the VAE's encoding" if trainer.unreadable is not None else ""),
            memory(trainer, activations),
            *schedule(trainer),
            "first batch of this process:",
            *(f"  {name} {tuple(value.shape)} {str(value.dtype)[6:]}" for name, value in batch.items()),
        ]
    )


def parameters(module: nn.Module) -> list[str]:
    """A line on each network."""
    lines = []
    for name, network in module.named_children():
        counts = [(value.numel(), value.requires_grad) for value in network.parameters()]
        trained = sum(count for count, requires_grad in counts if requires_grad)
        lines.append(f"{name}: {sum(count for count, _ in counts):,} parameters, {trained:,} of them trained")
    return lines


def schedule(trainer: Trainer) -> list[str]:
    batches, rate, processes = trainer.batches, trainer.rate, trainer.accelerator.num_processes
    epochs = rate.total_steps / trainer.steps_per_epoch
    return [
        f"global batch: {trainer.groups_per_step} groups of {batches.group_size} image(s): {batches.batch_size} x "
        f"{processes} process(es) x {trainer.accumulation} accumulation step(s)",
        f"schedule: {rate.total_steps} steps, {epochs:.1f} epochs of {batches.groups_per_epoch} groups; learning "
        f"rate {rate.peak:g} after {rate.warmup_steps} warm-up steps, then {rate.decay}",
        f"next step: {trainer.step + 1}" if trainer.step < rate.total_steps else "nothing is left to do",
    ]


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """The bytes of the whole model in training, by their use; activations come on top."""
    values = list(trainer.module.parameters())
    trained = sum(value.numel() for value in values if value.requires_grad)
    return {
        "weights": 4 * sum(value.numel() for value in values),
        "gradients": 4 * trained,
        "optimiser": OPTIMIZER_BYTES[trainer.config.optimizer.kind] * trained,
        "EMA": 4 * trained,
    }


def state_per_process(state: dict[str, int], sharding: str, processes: int) -> dict[str, int]:
    """What one of several processes keeps of the bytes in `state`."""
    share = {use: size // processes for use, size in state.items()}
    if sharding == "fsdp2":
        return share
    if sharding == "zero2" and processes > 1:
        # AdamW steps a copy of the process's share of the trained weights, and then sends it to all processes
        copied = state["weights"] + share["gradients"]
        return state | {"weights": copied, "gradients": share["gradients"], "optimiser": share["optimiser"]}
    return state


def memory(trainer: Trainer, activations: int) -> str:
    """A line on the bytes that one process needs, by their use."""
    state = state_per_process(state_bytes(trainer), trainer.config.sharding, trainer.accelerator.num_processes)
    uses = state | {"activations": activations}
    shown = ", ".join(f"{name} {size / 2**30:.3g}" for name, size in uses.items())
    return (
        f"memory, estimated: {sum(uses.values()) / 2**30:.3g} GiB per process ({shown}); dropout's masks, kernels' "
        "buffers and what processes exchange come on top"
    )


def measure(trainer: Trainer, batch: dict[str, Tensor]) -> tuple[int, int]:
    """Floating-point operations of a batch forward and backward, and bytes kept between the two; without dropout."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # keeping the storage alive also keeps its id from being reused for another one
        return tensor

    with shapes_only(trainer) as module:
        fakes = {name: torch.empty_like(value, device=trainer.accelerator.device) for name, value in batch.items()}
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
            with saved_tensors_hooks(keep, lambda tensor: tensor), trainer.accelerator.autocast():
                loss = module(**fakes).mean()
            for value in module.parameters():
                kept.pop(value.untyped_storage()._cdata, None)
            size = sum(storage.nbytes() for storage in kept.values())
            loss.backward()
    return counter.get_total_flops(), size


@contextmanager
def shapes_only(trainer: Trainer) -> Iterator[nn.Module]:
    """The run's model in evaluation mode. Its tensors, and what is computed in the `with` block, have no numbers."""
    original, device = trainer.engine.template, trainer.accelerator.device
    with FakeTensorMode(allow_non_fake_inputs=True):
        shapes: dict[int, Any] = {id(value): torch.empty_like(value, device=device) for value in original.buffers()}
        for value in original.parameters():
            shapes[id(value)] = nn.Parameter(torch.empty_like(value, device=device), value.requires_grad)
        module = copy.deepcopy(original, shapes)
        for name in ("forward", "_original_forward"):  # accelerate's wrappers, which would call the original model
            module.__dict__.pop(name, None)
        for part in module.modules():
            part._compiled_call_impl = None
        yield module.eval()
