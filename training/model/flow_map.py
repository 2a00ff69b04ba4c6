"""What a flow map learns from: the paths of its teacher, sampled as the teacher is sampled.

A flow map predicts the average velocity u from a time t to an earlier one r, x_r = x_t - (t - r) u. Of two points of
one path of the teacher's ODE it is known: (x_t - x_r) / (t - r). So a few accurate steps of the teacher from noise to
image are worth a target for every pair of times among them. Sequences are made as in sampling: one noise for all their
images, those fed back as they come out, and the teacher's guidance, which is thereby built in. Of the data the labels
alone are used.

Shapes: B groups, N images per group (1-step: N = 1), m the diffusion batch multiplier, K solver steps, C channels, s
latent side.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from transdiff_pipelines import FlowMapScheduler, TransDiffPipeline
from transdiff_pipelines.latents import NUM_TRAIN_TIMESTEPS
from transdiff_pipelines.models.key_value_cache import KeyValue

from .loss import condition_prefixes


if TYPE_CHECKING:
    from .build import TrainingModel


class FlowMapTeacher:
    """Makes the batches that `loss.flow_map_losses` takes.

    Args:
        student: the model as it starts, whole; a copy of it stays as the teacher.
        guidance_scales: for each of the N images, to be built into the student; 1 is none.
    """

    def __init__(self, student: TrainingModel, guidance_scales: Sequence[float]) -> None:
        model = copy.deepcopy(student).eval().requires_grad_(False)
        # Second order or better with one call a step; it also corrects each point of the path once it is evaluated.
        scheduler = UniPCMultistepScheduler.from_config(FlowMapScheduler().config)
        self.pipe = TransDiffPipeline(model.condition_encoder, model.transformer, None, scheduler)
        self.pipe.set_progress_bar_config(disable=True)
        self.guidance_scales = list(guidance_scales)

    @torch.no_grad()
    def __call__(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The batch of `flow_map_losses` from one of `GroupBatches`.

        Args:
            batch: `labels (B,)`; `noise (N, B * m, C, s, s)`, the first B of which begin the sequences; `sigmas (K,)`,
                the solver's grid without its 0; `begin` and `end (N, B * m)`, places 0..K on that grid.
        """
        labels, sigmas = batch["labels"], F.pad(batch["sigmas"], (0, 1))
        self.pipe.to(labels.device)
        paths = self.paths(labels, batch["noise"][0, : len(labels)], sigmas[:-1].tolist())
        latents = paths[-1].transpose(0, 1)
        rows = torch.arange(batch["begin"].shape[1], device=labels.device) % len(labels)
        images = torch.arange(len(self.guidance_scales), device=labels.device)[:, None]
        states, reached = (paths[batch[name], images, rows] for name in ("begin", "end"))
        times, next_times = sigmas[batch["begin"]], sigmas[batch["end"]]
        interval = (times - next_times)[..., None, None, None]
        targets = (states - reached) / interval.clamp(min=sigmas.diff().abs().min())
        here = slice(0, len(labels))  # of the m, the first is an interval of no length
        targets[:, here] = self.velocities(latents, labels, states[:, here], times[:, here])
        steps = {"timesteps": NUM_TRAIN_TIMESTEPS * times, "next_timesteps": NUM_TRAIN_TIMESTEPS * next_times}
        return {"latents": latents, "labels": labels, "states": states, "targets": targets} | steps

    def paths(self, labels: Tensor, noise: Tensor, sigmas: list[float]) -> Tensor:
        """Points `(K + 1, N, B, C, s, s)` of the paths of all images of the sequences, from noise to image."""
        points: list[Tensor] = []

        def record(pipe: TransDiffPipeline, step: int, _: Tensor, tensors: dict[str, Tensor]) -> dict[str, Any]:
            points.append(pipe.scheduler.last_sample)  # where the step began, corrected
            if (step + 1) % len(sigmas) == 0:
                points.append(tensors["latents"])
            return {}

        self.pipe(
            labels,
            self.guidance_scales,
            latents=noise,
            sigmas=sigmas,
            output_type="latent",
            callback_on_step_end=record,
        )
        return torch.stack(points).unflatten(0, (len(self.guidance_scales), -1)).transpose(0, 1)

    def velocities(self, latents: Tensor, labels: Tensor, states: Tensor, times: Tensor) -> Tensor:
        """The teacher's guided velocity at `states` `(N, B, C, s, s)` and `times` `(N, B)` in [0, 1]."""
        encoder, transformer = self.pipe.condition_encoder, self.pipe.transformer
        no_labels = torch.full_like(labels, encoder.null_class)
        prefixes = condition_prefixes(encoder, transformer, latents, labels)
        no_prefixes = condition_prefixes(encoder, transformer, latents, no_labels)
        velocities = []
        for image, scale in enumerate(self.guidance_scales):

            def predict(prefix: list[KeyValue], image: int = image) -> Tensor:
                return transformer(states[image], NUM_TRAIN_TIMESTEPS * times[image], prefix).sample.float()

            velocity = predict(prefixes[image])
            if scale != 1:
                unconditional = predict(no_prefixes[image])
                velocity = unconditional + scale * (velocity - unconditional)
            velocities.append(velocity)
        return torch.stack(velocities)
