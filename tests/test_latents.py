import pytest
import torch

from tests.tiny import tiny_vae
from transdiff_pipelines.latents import (
    noise_latents,
    pack_latents,
    renoise_latents,
    scale_latents,
    unpack_latents,
    unscale_latents,
    vae_stride,
)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpack_inverts_pack(patch_size):
    latents = torch.randn(2, 3, 8, 4)
    tokens = pack_latents(latents, patch_size)
    assert tokens.shape == (2, 8 * 4 // patch_size**2, 3 * patch_size**2)
    assert torch.equal(unpack_latents(tokens, patch_size, 8, 4), latents)


def test_tokens_run_row_by_row_and_channel_major_within_a_patch():
    latents = torch.arange(2 * 4 * 4).reshape(1, 2, 4, 4).float()
    token = pack_latents(latents, 2)[0, 1]  # first row of patches, second column
    assert token.tolist() == latents[0, :, 0:2, 2:4].flatten().tolist()


def test_the_path_goes_from_the_latents_to_the_noise():
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(noise_latents(latents, noise, 0.0), latents)
    assert torch.equal(noise_latents(latents, noise, 1.0), noise)
    sigma = torch.tensor([0.0, 1.0]).view(-1, 1, 1, 1)
    assert torch.equal(noise_latents(latents, noise, sigma), torch.stack([latents[0], noise[1]]))


def test_noising_on_stays_on_the_path():
    """The image's part is that of σ'; two independent noises add up to its variance."""
    latents, noise, fresh = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    further = renoise_latents(noise_latents(latents, noise, 0.3), fresh, 0.3, 0.8)
    share = (1 - 0.8) / (1 - 0.3) * 0.3
    torch.testing.assert_close(further, 0.2 * latents + share * noise + (0.8**2 - share**2) ** 0.5 * fresh)
    torch.testing.assert_close(renoise_latents(latents, fresh, 0.0, 0.8), noise_latents(latents, fresh, 0.8))


@pytest.mark.parametrize("shift", [{}, {"shift_factor": None}, {"shift_factor": 0.3}])
def test_unscaling_inverts_scaling(shift):
    config = {"scaling_factor": 0.5, **shift}
    latents = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    scaled = scale_latents(latents, config)
    assert torch.equal(scaled, (latents - (shift.get("shift_factor") or 0)) * 0.5)
    torch.testing.assert_close(unscale_latents(scaled, config), latents)


def test_the_stride_is_what_the_vae_does():
    vae = tiny_vae()
    side = 12 * vae_stride(vae.config)
    assert vae.encode(torch.zeros(1, 3, side, side)).latent_dist.mean.shape[-2:] == (12, 12)
