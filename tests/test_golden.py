"""Parity with the authors' implementation: its float32 outputs on small random models, through our converter.

A recorded set is a released-format checkpoint and what the authors' code computed with it: single forwards, whole
sampling runs with their noise, and training losses. Tokens are the latent grid row by row.

Shapes: B batch, T tokens of the latent grid, C channels, s latent side, N images per sequence.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from training.data.batches import truncate_timesteps
from training.model.loss import prefix_losses
from transdiff_pipelines import TransDiffPipeline, convert_original_checkpoint
from transdiff_pipelines.latents import pack_latents, unpack_latents


GOLDEN = Path(__file__).parent / "fixtures" / "golden"
VAE = GOLDEN / "vae.checkpoint-last.pth"
# A recording has the rounding of the processor that made it: a velocity in float64 is off it by up to 4.4e-5 of the
# largest, and another processor may be off as far to the other side. A loss is a mean, in which that averages out.
TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5

MODELS = ["one_step_256", "mrar_256", "one_step_512"]
TRAJECTORIES = [("one_step_256", 0), ("one_step_256", 1), ("one_step_256", 2)]
TRAJECTORIES += [("mrar_256", 0), ("mrar_256", 1), ("mrar_256", 2), ("one_step_512", 0)]


@dataclass
class Recorded:
    """One recorded set: the converted pipeline, the tensors and the sampling settings."""

    pipe: TransDiffPipeline
    tensors: dict[str, torch.Tensor]
    meta: dict

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def latents(self, name: str) -> torch.Tensor:
        """Recorded tokens `(..., T, C)` as latents `(..., C, s, s)`."""
        tokens = self.tensors[name]
        side = math.isqrt(tokens.shape[-2])
        return unpack_latents(tokens.flatten(0, -3), 1, side, side).unflatten(0, tokens.shape[:-2])


@cache
def recorded(name: str) -> Recorded:
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, the file is no mapping
        meta = json.loads(file.metadata()["meta"])
    checkpoint = GOLDEN / f"{name if name != 'vae' else 'one_step_256'}.checkpoint-last.pth"
    pipe = convert_original_checkpoint(checkpoint, VAE, num_attention_heads=2)
    pipe.set_progress_bar_config(disable=True)
    return Recorded(pipe, tensors, meta)


def assert_reproduces(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    """The largest error is within `tolerance` of the largest value."""
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"error {error:.1e} of the largest value, allowed {tolerance:.0e}"


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("conditional", [True, False], ids=["conditional", "unconditional"])
@torch.no_grad()
def test_condition(name: str, conditional: bool):
    golden = recorded(name)
    encoder = golden.pipe.condition_encoder
    labels = golden["labels"] if conditional else torch.full_like(golden["labels"], encoder.config.num_classes)
    references = golden["reference_images"][:, :-1] if name == "mrar_256" else None
    condition = encoder(labels, references).condition
    assert_reproduces(condition, golden["condition" if conditional else "condition_uncond"])


@pytest.mark.parametrize("name", ["one_step_256", "one_step_512"])
@torch.no_grad()
def test_features_before_the_second_position_embedding(name: str):
    golden = recorded(name)
    features = golden.pipe.condition_encoder(golden["labels"]).features
    assert_reproduces(features, golden["condition_before_position"])


@pytest.mark.parametrize("name", ["one_step_256", "one_step_512"])
@torch.no_grad()
def test_velocity(name: str):
    golden = recorded(name)
    velocity = golden.pipe.transformer(golden.latents("decoder.x"), golden["decoder.t"], golden["condition"]).sample
    assert_reproduces(pack_latents(velocity, 1), golden["decoder.v"])


@pytest.mark.parametrize("num_references", [0, 1, 2, 3])
@torch.no_grad()
def test_mrar_velocity_of_each_prefix(num_references: int):
    golden = recorded("mrar_256")
    # The shorter sequences are encoded by themselves, as in sampling: causality makes them prefixes of the whole one.
    references = golden["reference_images"][:, :num_references] if num_references else None
    condition = golden.pipe.condition_encoder(golden["labels"], references).condition
    length = 64 * (num_references + 1)
    assert_reproduces(condition, golden["condition"][:, :length])
    velocity = golden.pipe.transformer(golden.latents("decoder.x"), golden["decoder.t"], condition).sample
    assert_reproduces(pack_latents(velocity, 1), golden[f"decoder.v{length}"])


@torch.no_grad()
def test_vae_moments():
    golden = recorded("vae")
    moments = golden.pipe.vae.encode(golden["image"]).latent_dist.parameters
    assert_reproduces(moments, golden["moments"])


@torch.no_grad()
def test_vae_decoding():
    golden = recorded("vae")
    assert_reproduces(golden.pipe.vae.decode(golden["latent"]).sample, golden["decoded"])


def with_step_noise(pipe: TransDiffPipeline, draws: Iterator[torch.Tensor]) -> None:
    """Make the scheduler take each step's noise from `draws`; the last step of a run, the mean only, takes none."""
    scheduler = pipe.scheduler
    step = scheduler.step

    def step_with_recorded_noise(model_output, timestep, sample, **kwargs):
        is_last = timestep == scheduler.timesteps[-1]
        return step(model_output, timestep, sample, variance_noise=None if is_last else next(draws), **kwargs)

    scheduler.step = step_with_recorded_noise


@pytest.mark.parametrize(("name", "case"), TRAJECTORIES)
def test_trajectory(name: str, case: int):
    golden = recorded(name)
    guidance_scale, drift_scale, diffusion_scale = golden.meta["cfg_scale0_scale1"][case]
    components = dict(golden.pipe.components)
    components["scheduler"] = type(golden.pipe.scheduler).from_config(
        golden.pipe.scheduler.config, drift_scale=drift_scale, diffusion_scale=diffusion_scale
    )
    pipe = TransDiffPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    draws = iter(golden.latents(f"sample{case}.step_noise"))
    with_step_noise(pipe, draws)

    latents = pipe(
        golden["labels"],
        guidance_scale=guidance_scale,
        num_inference_steps=golden.meta["num_inference_steps"],
        latents=golden.latents(f"sample{case}.noise"),
        output_type="latent",
    ).images

    assert_reproduces(latents, golden[f"sample{case}.latents"])
    assert next(draws, None) is None, "the run drew less noise than the recorded one"


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_training_loss(name: str):
    golden = recorded(name)
    images = golden["reference_images"] if name == "mrar_256" else golden["loss.images"].unsqueeze(1)
    timesteps = truncate_timesteps(golden["loss.t"])
    noise = golden.latents("loss.noise")
    if name != "mrar_256":
        timesteps, noise = timesteps.unsqueeze(0), noise.unsqueeze(0)
    encoder, transformer = golden.pipe.condition_encoder, golden.pipe.transformer
    loss = prefix_losses(encoder, transformer, images, golden["labels"], timesteps, noise).mean()
    assert_reproduces(loss.reshape(1), golden["loss.value"], LOSS_TOLERANCE)
