"""The loss on images that are held out of training.

Images, noises and timesteps are the same each time, so that the losses of different steps, and of raw and averaged
weights, can be compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn

from training.data.batches import Batch, GroupBatches, TrainingData, batch_loader
from training.settings.config import TrainConfig


class Validation:
    """Measures the loss on held-out images. No label is dropped; the last batch is filled up with images that were
    used before.

    Args:
        held_out: the images.
        config: gives the batch size, the diffusion batch multiplier and the seed.
        accelerator: all its processes take part, each with its share of every batch.
        prepare: makes latents of images that are not cached, and of a flow map's batch what its teacher makes of it.
    """

    def __init__(
        self,
        held_out: TrainingData,
        config: TrainConfig,
        accelerator: Accelerator,
        prepare: Callable[[Batch], Batch],
    ) -> None:
        self.accelerator, self.prepare, self.workers = accelerator, prepare, config.data.workers
        self.batches = GroupBatches.of(
            config,
            held_out,
            label_dropout=0.0,
            groups_per_epoch=None,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        self.count = -(-self.batches.groups_per_epoch // self.batches.global_batch_size)

    @torch.no_grad()
    def loss(self, module: nn.Module) -> float:
        """The mean loss of a module with its weights as they are, in evaluation mode; all processes call this."""
        training = module.training
        module.eval()
        device = self.accelerator.device
        losses = []
        for batch in batch_loader(self.batches, 0, self.count, self.workers):
            batch = self.prepare({name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()})
            with self.accelerator.autocast():
                losses.append(module(**batch).float().mean())
        module.train(training)
        return float(self.accelerator.reduce(torch.stack(losses).mean(), reduction="mean"))
