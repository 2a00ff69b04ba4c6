"""Laws of the velocity loss. Its values against the released implementation are in tests/test_golden.py."""

import pytest
import torch
from rounding import assert_close

from benchmarks.training import tiled_losses
from training.data.batches import drop_labels, logit_normal_timesteps, truncate_timesteps
from training.model.loss import prefix_losses, tile
from transdiff_pipelines import ARConditionEncoder, TransDiffTransformer2DModel


def velocity_loss(*models: torch.nn.Module, **batch: torch.Tensor) -> torch.Tensor:
    """The mean over the images of a sequence, which a run takes the gradient of."""
    return prefix_losses(*models, **batch).mean()


def networks(
    patch_size: int, scales: list[int] | None = None
) -> tuple[ARConditionEncoder, TransDiffTransformer2DModel]:
    torch.manual_seed(0)
    shared = {"sample_size": 4, "in_channels": 2, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1}
    encoder = ARConditionEncoder(num_classes=3, patch_size=patch_size, scales=scales, num_class_tokens=2, **shared)
    decoder = TransDiffTransformer2DModel(cross_attention_dim=8, **shared)
    # the last linear starts at zero: without this the velocity would not depend on anything
    torch.nn.init.normal_(decoder.proj_out.weight, std=0.5)
    return encoder.eval(), decoder.eval()


def inputs(num_images: int, batch: int = 3, times: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "latents": torch.randn(batch, num_images, 2, 4, 4, generator=generator),
        "labels": torch.tensor([0, 2, 3])[:batch],
        "timesteps": torch.randint(0, 1000, (num_images, batch * times), generator=generator),
        "noise": torch.randn(num_images, batch * times, 2, 4, 4, generator=generator),
    }


@pytest.mark.parametrize("patch_size", [1, 2])
@torch.no_grad()
def test_m_tiles_are_the_mean_of_m_single_losses(patch_size: int) -> None:
    models, batch = networks(patch_size), inputs(patch_size**2)
    singles = [
        velocity_loss(*models, **batch | {name: batch[name][:, part] for name in ("timesteps", "noise")})
        for part in (slice(0, 3), slice(3, 6))
    ]
    assert_close(velocity_loss(*models, **batch), torch.stack(singles).mean())


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_condition_projected_once_gives_the_losses_and_gradients_of_tiled_ones(patch_size: int) -> None:
    # In float64, because some gradients are 0 but for rounding; the last operation, the square, is float32.
    models = [model.double() for model in networks(patch_size)]
    batch = inputs(patch_size**2)
    batch |= {name: batch[name].double() for name in ("latents", "noise")}
    results = []
    for losses_of in (prefix_losses, tiled_losses):
        losses = losses_of(*models, **batch)
        trained = [value for model in models for value in model.parameters()]
        gradients = torch.autograd.grad(losses.mean(), trained, allow_unused=patch_size == 1)
        results.append((losses, [gradient for gradient in gradients if gradient is not None]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, check_dtype=False)


@torch.no_grad()
def test_later_images_do_not_change_the_losses_of_earlier_ones() -> None:
    models, batch = networks(2), inputs(4)
    before = prefix_losses(*models, **batch)
    batch["latents"][:, 2] += 1
    after = prefix_losses(*models, **batch)
    assert_close(after[:2], before[:2])
    assert (after[2:] != before[2:]).all()


@torch.no_grad()
def test_each_image_is_decoded_from_the_groups_up_to_its_own() -> None:
    seen = []

    class Spy(TransDiffTransformer2DModel):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            seen.append(encoder_hidden_states[0][0].shape[1])  # the keys of the first block
            return super().forward(hidden_states, timestep, encoder_hidden_states)

    for patch_size, scales, lengths in ((2, None, [4, 8, 12, 16]), (1, [1, 2, 3], [1, 5, 14])):
        encoder, decoder = networks(patch_size, scales)
        decoder.__class__ = Spy
        prefix_losses(encoder, decoder, **inputs(len(lengths)))
        assert seen == lengths
        seen.clear()


@torch.no_grad()
def test_a_reference_changes_the_next_image() -> None:
    models, batch = networks(2), inputs(4)
    before = prefix_losses(*models, **batch)
    batch["latents"][:, 0] += 1
    assert (prefix_losses(*models, **batch)[1:] != before[1:]).all()


@torch.no_grad()
def test_the_loss_is_the_squared_distance_to_noise_minus_image() -> None:
    """A decoder that answers zero, as a fresh one does, leaves the mean square of the target."""
    encoder, decoder = networks(1)
    torch.nn.init.zeros_(decoder.proj_out.weight)
    batch = inputs(1)
    target = batch["noise"][0] - tile(batch["latents"][:, 0], 2)
    assert_close(velocity_loss(encoder, decoder, **batch), target.square().mean())


@torch.no_grad()
def test_the_decoder_sees_the_truncated_time_and_its_mixture() -> None:
    seen = {}

    class Spy(TransDiffTransformer2DModel):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            seen.update(noisy=hidden_states, timestep=timestep)
            return super().forward(hidden_states, timestep, encoder_hidden_states)

    encoder, decoder = networks(1)
    decoder.__class__ = Spy
    batch = inputs(1, times=1)
    batch["timesteps"] = torch.tensor([[0, 250, 999]])
    velocity_loss(encoder, decoder, **batch)
    clean, noise = batch["latents"][:, 0], batch["noise"][0]
    sigma = torch.tensor([0, 0.25, 0.999]).view(3, 1, 1, 1)
    torch.testing.assert_close(seen["noisy"], (1 - sigma) * clean + sigma * noise)
    assert seen["timestep"].tolist() == [0, 250, 999]


def test_every_trained_tensor_gets_a_gradient() -> None:
    """In a 1-step model the projection alone gets none, which is why training freezes it."""
    projection = {"reference_projection.weight", "reference_projection.bias"}
    for patch_size, scales, idle in ((1, None, projection), (2, None, set()), (1, [1, 2, 3], set())):
        models = networks(patch_size, scales)
        velocity_loss(*models, **inputs(models[0].num_images)).backward()
        without = {name for model in models for name, value in model.named_parameters() if value.grad is None}
        assert without == idle


def test_times_are_truncated_not_rounded_and_stay_below_1000() -> None:
    assert truncate_timesteps(torch.tensor([0.0, 0.0019, 0.5, 0.9999, 1.0])).tolist() == [0, 1, 500, 999, 999]
    assert logit_normal_timesteps(torch.tensor([-100.0, 0.0, 1.0, 100.0])).tolist() == [0, 500, 731, 999]


def test_dropped_labels_become_the_null_class() -> None:
    labels = drop_labels(torch.tensor([0, 1, 2]), torch.tensor([True, False, True]), 10)
    assert labels.tolist() == [10, 1, 10]


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [("timesteps", (1, 6), "timesteps have shape"), ("noise", (4, 3, 2, 4, 4), "noise has shape")],
)
def test_shapes_that_do_not_fit_are_errors(name: str, shape: tuple[int, ...], words: str) -> None:
    batch = inputs(4)
    batch[name] = torch.zeros(shape, dtype=batch[name].dtype)
    with pytest.raises(ValueError, match=words):
        velocity_loss(*networks(2), **batch)
