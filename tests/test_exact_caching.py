"""Work done once instead of often: the same numbers as without, and the work counted."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from rounding import assert_close
from tiny import CHANNELS, NUM_CLASSES, SIDE, seeded, tiny_encoder, tiny_pipeline, tiny_transformer
from torch.utils._python_dispatch import TorchDispatchMode

from transdiff_pipelines import FlowMatchEulerMaruyamaScheduler


STEPS = 3
LABELS = torch.tensor([0, 3])


def latents_of(pipe, labels, **kwargs):
    return pipe(
        labels, **{"num_inference_steps": STEPS, "generator": seeded(), "output_type": "latent", **kwargs}
    ).images


def reference_sampler(pipe, labels, guidance):
    """The sampler without any caching: whole prefixes encoded anew, tokens projected at every step."""
    encoder, transformer, scheduler = pipe.condition_encoder, pipe.transformer, pipe.scheduler
    generator, labels = seeded(), torch.tensor(labels)
    noise = torch.randn(len(labels), CHANNELS, SIDE, SIDE, generator=generator)
    both = torch.cat([torch.full_like(labels, NUM_CLASSES), labels])
    images: list[torch.Tensor] = []
    for _ in range(encoder.num_images):
        references = torch.stack(images, dim=1).repeat(2, 1, 1, 1, 1) if images else None
        condition = encoder(both, references).condition
        latents = noise
        scheduler.set_timesteps(STEPS)
        for timestep in scheduler.timesteps:
            velocity = transformer(torch.cat([latents, latents]), timestep.expand(len(both)), condition).sample
            unconditional, conditional = velocity.chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(velocity, timestep, latents, generator=generator).prev_sample
        images.append(latents)
    return images[-1]


@pytest.mark.parametrize(("patch_size", "scales"), [(1, None), (2, None), (4, None), (1, [1, 2, 3])])
@torch.no_grad()
def test_the_pipeline_equals_the_uncached_sampler(patch_size, scales):
    pipe = tiny_pipeline(condition_encoder=tiny_encoder(patch_size, scales=scales))
    labels = [0, 3, 0]
    expected = reference_sampler(pipe, labels, 1.6)
    result = latents_of(pipe, labels, guidance_scale=1.6)
    assert_close(result, expected)


@pytest.mark.parametrize("groups", [{"patch_size": 2}, {"patch_size": 1, "scales": [1, 2, 3]}])
def test_a_sequence_encoded_group_by_group(groups):
    encoder = tiny_encoder(**groups).double()
    references = torch.randn(2, encoder.num_images - 1, CHANNELS, SIDE, SIDE, generator=seeded())
    whole = encoder(LABELS, references)
    for cut in (1, 2):
        cache = encoder.new_cache()
        parts = [encoder(LABELS, cache=cache)]
        parts += [encoder(LABELS, images, cache=cache) for images in references.split(cut, dim=1)]
        for name in ("condition", "features"):
            joined = torch.cat([part[name] for part in parts], dim=1)
            torch.testing.assert_close(joined, whole[name])


def test_a_full_cache_takes_no_more_images():
    encoder, image = tiny_encoder(2), torch.zeros(2, 1, CHANNELS, SIDE, SIDE)
    cache = encoder.new_cache()
    encoder(LABELS, cache=cache)
    with pytest.raises(ValueError, match="the cache has seen the labels already"):
        encoder(LABELS, cache=cache)
    for _ in range(3):
        encoder(LABELS, image, cache=cache)
    with pytest.raises(ValueError, match="4 reference images do not fit"):
        encoder(LABELS, image, cache=cache)


@pytest.mark.parametrize("fused", [False, True])
def test_projected_condition_equals_its_tokens(fused):
    transformer = tiny_transformer()
    if fused:
        transformer.fuse_qkv_projections()
    latents, tokens = torch.randn(2, CHANNELS, SIDE, SIDE), torch.randn(2, 6, 16)
    projected = transformer.project_condition(tokens)
    assert torch.equal(transformer(latents, 300.0, projected).sample, transformer(latents, 300.0, tokens).sample)


class Operations(TorchDispatchMode):
    """Counts what is computed, views left out: each is a kernel that a GPU's program has to launch."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize(("fused", "launches"), [(False, 17), (True, 15)])
def test_a_block_launches_few_operations(fused, launches):
    """Three norms, eight or six products, two attentions, GELU, two gates, one addition; nothing for the time.

    In bfloat16, whose results the tests' option for varied rounding leaves alone.
    """
    counts = []
    for num_layers in (1, 3):
        transformer = tiny_transformer(num_layers=num_layers).eval().to(torch.bfloat16)
        if fused:
            transformer.fuse_qkv_projections()
        latents, tokens = torch.randn(2, CHANNELS, SIDE, SIDE), torch.randn(2, 6, 16)
        condition = transformer.project_condition(tokens.bfloat16())
        with Operations() as operations:
            transformer(latents.bfloat16(), torch.tensor(300.0), condition)
        counts.append(operations.count)
    assert counts[1] - counts[0] == 2 * launches


@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_work_is_counted(patch_size):
    """Keys and values once an image and block; one new group an AR step; one row for equal labels; one time row."""
    pipe = tiny_pipeline(patch_size)
    calls: Counter[str] = Counter()
    encoder_rows, encoder_tokens, time_rows = [], [], []
    for block in pipe.transformer.transformer_blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: calls.update(["key"]))
        block.attn2.to_v.register_forward_hook(lambda *_: calls.update(["value"]))
        block.attn2.to_q.register_forward_hook(lambda *_: calls.update(["query"]))
    first_block = pipe.condition_encoder.transformer_blocks[0]
    first_block.register_forward_hook(lambda module, args, output: encoder_rows.append(output.shape[0]))
    first_block.register_forward_hook(lambda module, args, output: encoder_tokens.append(output.shape[1]))
    pipe.transformer.time_modulation.register_forward_hook(lambda m, args, output: time_rows.append(output.shape[0]))

    latents_of(pipe, [1, 1, 4], guidance_scale=1.5)
    num_images, blocks = pipe.condition_encoder.num_images, len(pipe.transformer.transformer_blocks)
    assert calls["key"] == calls["value"] == num_images * blocks
    assert calls["query"] == num_images * blocks * STEPS
    assert time_rows == [1] * num_images * STEPS
    group = pipe.condition_encoder.group_sizes[0]
    class_tokens = pipe.condition_encoder.config.num_class_tokens
    assert encoder_tokens == [class_tokens + group] + [group] * (num_images - 1)
    prefixes = [class_tokens + group * (i + 1) for i in range(num_images)]
    assert num_images == 1 or sum(encoder_tokens) <= 0.5 * sum(prefixes)
    # null, 1 and 4 at first; then every image of both branches is different
    assert encoder_rows == [3] + [6] * (num_images - 1)


def test_guidance_interval_skips_the_second_branch():
    pipe = tiny_pipeline(1)
    rows = []
    pipe.transformer.proj_in.register_forward_hook(lambda m, args, output: rows.append(output.shape[0]))
    latents_of(pipe, [0, 1], guidance_scale=1.5, guidance_interval=(0.3, 0.6))
    assert rows == [2, 4, 2]  # sigmas 1, 0.52, 0.04
    rows.clear()
    everywhere = latents_of(pipe, [0, 1], guidance_scale=1.5, guidance_interval=(0.0, 1.0))
    assert rows == [4, 4, 4]
    assert torch.equal(everywhere, latents_of(pipe, [0, 1], guidance_scale=1.5))
    nowhere = latents_of(pipe, [0, 1], guidance_scale=1.5, guidance_interval=(0.6, 0.7))
    assert_close(nowhere, latents_of(pipe, [0, 1], guidance_scale=1.0))


@pytest.mark.parametrize("steps", [4, 25])
@pytest.mark.parametrize(
    "scheduler", [FlowMatchEulerMaruyamaScheduler, UniPCMultistepScheduler, FlowMatchHeunDiscreteScheduler]
)
def test_a_guidance_interval_includes_its_bounds(scheduler, steps):
    """Whatever float32 made of the grid's sigmas, and whether the scheduler's timesteps are rounded."""
    pipe = tiny_pipeline(1)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.scheduler.set_timesteps(steps)
    count = len(pipe.scheduler.timesteps)
    sigmas = [round(sigma, 6) for sigma in pipe.scheduler.sigmas[:count].tolist()]
    rows = []
    pipe.transformer.proj_in.register_forward_hook(lambda m, args, output: rows.append(output.shape[0]))
    for low, high in ((sigmas[-2], sigmas[1]), (sigmas[2], sigmas[0]), (sigmas[1], sigmas[1])):
        rows.clear()
        latents_of(pipe, 0, guidance_scale=1.5, guidance_interval=(low, high), num_inference_steps=steps)
        assert rows == [2 if low <= sigma <= high else 1 for sigma in sigmas]


def test_what_the_encoder_keeps_is_let_go_of_before_the_last_image(monkeypatch):
    """Its keys and values serve the next image alone."""
    pipe, caches, kept = tiny_pipeline(2), [], []
    new_cache = pipe.condition_encoder.new_cache

    def recorded():
        cache = new_cache()
        caches.extend(map(weakref.ref, cache))
        return cache

    def count(pipe, step, timestep, tensors):
        gc.collect()
        kept.append((pipe.current_ar_step, any(layer() is not None for layer in caches)))

    monkeypatch.setattr(pipe.condition_encoder, "new_cache", recorded)
    latents_of(pipe, [0, 1], callback_on_step_end=count)
    assert sorted(set(kept)) == [(0, True), (1, True), (2, True), (3, False)]


@pytest.mark.parametrize("interval", [(0.5, 0.2), (-0.1, 0.5), (0.0, 1.1), (0.5,)])
def test_bad_guidance_interval(interval):
    with pytest.raises(ValueError, match="guidance_interval is"):
        tiny_pipeline(1)(0, guidance_interval=interval)


def test_a_condition_replaced_by_a_callback_is_projected_anew():
    pipe = tiny_pipeline(1, guidance_scale=1.0)
    other = pipe.encode_condition(torch.tensor([3]))

    def swap(pipe, step, timestep, tensors):
        return {"condition": other} if step == 0 else {}

    swapped = latents_of(pipe, 0, callback_on_step_end=swap)
    assert not torch.equal(swapped, latents_of(pipe, 0))
    assert not torch.equal(swapped, latents_of(pipe, 3))
