"""diffusers' approximating caches on the decoder: on they save work at a bounded error, off they leave no trace."""

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_faster_cache, apply_layer_skip
from rounding import assert_close
from tiny import randomize, seeded, tiny_pipeline
from torch import nn

from transdiff_pipelines import FlowMatchEulerMaruyamaScheduler, TransDiffTransformer2DModel


STEPS = 30


def first_block(pipe):
    return FirstBlockCacheConfig(threshold=0.25)


def mag(pipe):
    return MagCacheConfig(threshold=0.06, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS))


def taylor_seer(pipe):
    return TaylorSeerCacheConfig(
        cache_interval=3,
        disable_cache_before_step=4,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|attn2|ff)"],
    )


def taylor_seer_lite(pipe):
    return TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=4, taylor_factors_dtype=torch.float32, use_lite_mode=True
    )


def pyramid(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        spatial_attention_timestep_skip_range=(100, 950),
        cross_attention_timestep_skip_range=(100, 950),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


def faster(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 901),
        unconditional_batch_skip_range=3,
        unconditional_batch_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        tensor_format="BCHW",
        current_timestep_callback=lambda: pipe.current_timestep,
    )


# Each cache with bounds: the share of the rows of linear layers that it still computes, and the relative error of the
# latents. Both are those of a random decoder of three blocks; a trained and deep one gains more and errs less.
CACHES = {
    first_block: (0.5, 0.06),
    mag: (0.5, 0.04),
    taylor_seer: (0.6, 0.02),
    taylor_seer_lite: (0.7, 0.04),
    pyramid: (0.85, 0.01),
    faster: (0.75, 0.01),
}


def pipeline(patch_size=1):
    torch.manual_seed(0)
    # Milder weights than the other tests': a velocity as smooth in time as a trained one's.
    transformer = randomize(
        TransDiffTransformer2DModel(
            sample_size=4,
            in_channels=4,
            num_layers=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
        ),
        std=0.05,
    )
    scheduler = FlowMatchEulerMaruyamaScheduler(diffusion_scale=0.5)
    return tiny_pipeline(patch_size, transformer=transformer, scheduler=scheduler)


def run(pipe, num_inference_steps=STEPS, **kwargs):
    kwargs = {"generator": seeded(), "output_type": "latent", **kwargs}
    return pipe([1, 4], num_inference_steps=num_inference_steps, **kwargs).images


class Work:
    """Counts the rows that the decoder's linear layers are given."""

    def __init__(self, model):
        self.rows = 0
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.register_forward_pre_hook(self._count)

    def _count(self, layer, inputs):
        self.rows += inputs[0].shape[:-1].numel() * layer.weight.numel()

    def take(self):
        rows, self.rows = self.rows, 0
        return rows


class TestApproximation:
    @pytest.mark.parametrize("cache", CACHES)
    def test_on_saves_work_and_off_leaves_no_trace(self, cache):
        pipe = pipeline()
        work = Work(pipe.transformer)
        exact = run(pipe)
        # The exact caching of the condition's projections rests while a cache is on: compare with the tokens' path.
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=-1.0))
        work.take()
        assert_close(run(pipe), exact)
        full = work.take()
        pipe.transformer.disable_cache()

        pipe.transformer.enable_cache(cache(pipe))
        cached = run(pipe)
        share, error = work.take() / full, ((cached - exact).norm() / exact.norm()).item()
        max_share, max_error = CACHES[cache]
        print(f"{cache.__name__}: {share:.2f} of the work, relative error {error:.6f}")
        assert share < max_share
        assert 0 < error < max_error
        # Nothing is carried from one call to the next.
        assert torch.equal(run(pipe), cached)

        pipe.transformer.disable_cache()
        assert torch.equal(run(pipe), exact)

    def test_attached_without_the_model_knowing(self):
        """By diffusers' functions instead of `enable_cache`."""
        by_model, by_function = pipeline(), pipeline()
        by_model.transformer.enable_cache(faster(by_model))
        apply_faster_cache(by_function.transformer, faster(by_function))
        assert torch.equal(run(by_model, 6), run(by_function, 6))


@pytest.mark.parametrize("cache", CACHES)
class TestState:
    def test_every_image_of_a_sequence_starts_afresh(self, cache):
        """The last image is that of a run of its own under the same condition."""
        pipe = pipeline(patch_size=2)
        pipe.scheduler.register_to_config(diffusion_scale=0.0)
        noise, seen = torch.randn(2, 4, 4, 4, generator=seeded()), {}

        def keep(pipe, step, timestep, tensors):
            seen.update(tensors)

        pipe.transformer.enable_cache(cache(pipe))
        last = run(pipe, 8, latents=noise, callback_on_step_end=keep, callback_on_step_end_tensor_inputs=["condition"])
        assert torch.equal(pipe.denoise(noise, seen["condition"], 8), last)

    def test_a_failed_call_leaves_nothing(self, cache):
        pipe = pipeline(patch_size=2)
        pipe.transformer.enable_cache(cache(pipe))
        expected = run(pipe, 8)

        def fail(pipe, step, timestep, tensors):
            if step == 5:
                raise RuntimeError("stop here")

        with pytest.raises(RuntimeError, match="stop here"):
            run(pipe, 8, callback_on_step_end=fail)
        assert torch.equal(run(pipe, 8), expected)

    def test_other_batch_sizes_follow(self, cache):
        pipe = pipeline()
        pipe.transformer.enable_cache(cache(pipe))
        expected = run(pipe, 8)
        pipe([0, 1, 2], num_inference_steps=8)
        assert torch.equal(run(pipe, 8), expected)


class TestGuidance:
    @pytest.mark.parametrize("cache", [name for name in CACHES if name is not faster])
    def test_steps_without_guidance(self, cache):
        """The batch halves on the way; what a cache holds of the larger one is dropped."""
        pipe = pipeline()
        exact = run(pipe, guidance_interval=(0.3, 0.8))
        pipe.transformer.enable_cache(cache(pipe))
        assert ((run(pipe, guidance_interval=(0.3, 0.8)) - exact).norm() / exact.norm()).item() < 2 * CACHES[cache][1]

    @pytest.mark.parametrize("arguments", [{"guidance_scale": 1.0}, {"guidance_interval": (0.3, 0.8)}])
    def test_faster_cache_wants_guidance_at_every_step(self, arguments):
        pipe = pipeline()
        pipe.transformer.enable_cache(faster(pipe))
        with pytest.raises(ValueError, match="FasterCache expects guidance at every step"):
            run(pipe, **arguments)

    def test_faster_cache_without_guidance(self):
        pipe = pipeline()
        exact = run(pipe, guidance_scale=1.0)
        config = faster(pipe)
        config.is_guidance_distilled = True
        pipe.transformer.enable_cache(config)
        assert ((run(pipe, guidance_scale=1.0) - exact).norm() / exact.norm()).item() < CACHES[faster][1]


class TestLayerSkip:
    def test_a_skipped_block_is_a_missing_block(self):
        x, condition = torch.randn(2, 4, 4, 4, generator=seeded()), torch.randn(2, 16, 16, generator=seeded(1))
        skipping, without = pipeline().transformer, pipeline().transformer
        apply_layer_skip(skipping, LayerSkipConfig(indices=[1], fqn="transformer_blocks"))
        without.transformer_blocks.pop(1)
        assert torch.equal(skipping(x, 500.0, condition).sample, without(x, 500.0, condition).sample)

    def test_skipped_attention_hands_on_its_input(self):
        x, condition = torch.randn(2, 4, 4, 4, generator=seeded()), torch.randn(2, 16, 16, generator=seeded(1))
        skipping, replaced = pipeline().transformer, pipeline().transformer
        apply_layer_skip(skipping, LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_ff=False))
        # diffusers skips self-attention only.
        replaced.transformer_blocks[1].attn1.forward = lambda hidden_states: hidden_states
        assert torch.equal(skipping(x, 500.0, condition).sample, replaced(x, 500.0, condition).sample)
