import pytest
import torch

from transdiff_pipelines.latents import pack_latents, unpack_latents


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
