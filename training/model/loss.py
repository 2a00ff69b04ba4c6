"""The velocity loss of 1-step and MRAR models (Eq. 8, 10, 12), as pure functions: every random draw is an argument.

Shapes: B groups, N images per group (1-step: N = 1), m the diffusion batch multiplier, C channels, s latent side.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel
from transdiff_pipelines.latents import NUM_TRAIN_TIMESTEPS, noise_latents
from transdiff_pipelines.models.key_value_cache import KeyValue


def tile(tensor: Tensor, times: int) -> Tensor:
    """The whole batch `times` times, one copy after the other (not each element repeated in place)."""
    return tensor.repeat(times, *[1] * (tensor.ndim - 1))


def condition_prefixes(
    encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel, latents: Tensor, labels: Tensor
) -> list[list[KeyValue]]:
    """What the decoder attends to for each of the N images, projected once for all of them and all times.

    Args:
        latents: `(B, N, C, s, s)` images of the sequences in scaled units.
        labels: `(B,)` class indices; the null class where the label is dropped.
    """
    num_images = latents.shape[1]
    references = latents[:, :-1] if num_images > 1 else None
    projected = transformer.project_condition(encoder(labels, references).condition)
    # Eq. 12: attention is block-causal, so the condition of image i is a prefix of the whole one.
    ends = list(accumulate(encoder.group_sizes))[:num_images]
    return [[(key[:, :end], value[:, :end]) for key, value in projected] for end in ends]


def prefix_losses(
    encoder: ARConditionEncoder,
    transformer: TransDiffTransformer2DModel,
    latents: Tensor,
    labels: Tensor,
    timesteps: Tensor,
    noise: Tensor,
) -> Tensor:
    """Mean squared velocity error of each image given the images before it.

    Args:
        encoder: labels `(B,)` and reference latents `(B, N - 1, C, s, s)` -> condition `(B, S, D)`, N groups of its
            `group_sizes` tokens.
        transformer: noisy latents, timestep and condition, projected once for all images and times -> velocity.
        latents: `(B, N, C, s, s)` clean latents in scaled units, N different images of one class each; with a
            scale-level encoder N times the same image.
        labels: `(B,)` class indices; the null class where the label is dropped.
        timesteps: `(N, B * m)` integers in [0, 1000), ordered as the batch tiled m times.
        noise: `(N, B * m, C, s, s)` standard normal, ordered likewise.

    Returns:
        `(N,)` losses, float32.

    Raises:
        ValueError: if the shapes do not fit together.
    """
    times = check_shapes(latents, timesteps, noise)
    losses = []
    for image, prefix in enumerate(condition_prefixes(encoder, transformer, latents, labels)):
        clean = tile(latents[:, image], times)
        # Eq. 4: x_t = (1 - t) x_0 + t eps with velocity eps - x_0; the network sees the truncated t as well.
        sigma = (timesteps[image].to(clean.dtype) / NUM_TRAIN_TIMESTEPS).view(-1, 1, 1, 1)
        noisy = noise_latents(clean, noise[image], sigma)
        velocity = transformer(noisy, timesteps[image], prefix).sample
        losses.append(F.mse_loss(velocity.float(), (noise[image] - clean).float()))
    return torch.stack(losses)


def check_shapes(latents: Tensor, timesteps: Tensor, noise: Tensor) -> int:
    """The diffusion batch multiplier m that `timesteps` and `noise` imply for `latents`."""
    batch, num_images, *image_shape = latents.shape
    times = timesteps.shape[-1] // batch
    if times < 1 or tuple(timesteps.shape) != (num_images, batch * times):
        raise ValueError(
            f"timesteps have shape {tuple(timesteps.shape)}; for latents {tuple(latents.shape)} it must be "
            f"({num_images}, {batch} * m)"
        )
    expected = (num_images, batch * times, *image_shape)
    if tuple(noise.shape) != expected:
        raise ValueError(
            f"noise has shape {tuple(noise.shape)}; for these latents and timesteps it must be {expected}"
        )
    return times


def flow_map_losses(
    encoder: ARConditionEncoder,
    transformer: TransDiffTransformer2DModel,
    latents: Tensor,
    labels: Tensor,
    states: Tensor,
    timesteps: Tensor,
    next_timesteps: Tensor,
    targets: Tensor,
    error_scale: float | None = None,
) -> Tensor:
    """Mean squared error of the average velocity of each image given the images before it.

    With an `error_scale` c the gradient of a pair with the mean squared error e is multiplied by c / (e + c): pairs
    that are far off then do not outweigh all others. The losses themselves stay mean squares.

    Args:
        encoder, transformer: as in `prefix_losses`.
        latents: `(B, N, C, s, s)` images of the sequences, which the later ones are conditioned on.
        labels: `(B,)` class indices.
        states: `(N, B * m, C, s, s)` points of paths, ordered as the batch tiled m times.
        timesteps, next_timesteps: `(N, B * m)` numbers in [0, 1000], where the points are and where they go.
        targets: average velocities, in the shape of `states`.
        error_scale: c, a squared velocity; None: all pairs weigh the same.

    Returns:
        `(N,)` losses, float32.
    """
    losses = []
    for image, prefix in enumerate(condition_prefixes(encoder, transformer, latents, labels)):
        velocity = transformer(states[image], timesteps[image], prefix, next_timestep=next_timesteps[image]).sample
        errors = (velocity.float() - targets[image]).square().flatten(1).mean(1)
        losses.append(errors.mean() if error_scale is None else weighted_mean(errors, error_scale))
    return torch.stack(losses)


def weighted_mean(errors: Tensor, scale: float) -> Tensor:
    """The mean of `errors`, with the gradient of their mean weighted by `scale / (errors + scale)`."""
    weights = scale / (errors.detach() + scale)
    weighted = (weights * errors).mean()
    return weighted + (errors.mean() - weighted).detach()
