"""Offloading, device maps, layerwise casting: the same images with weights that come and go.

The law is the same for every way to save memory, and shows on a CPU where the weights leave for another place than
device memory: for the meta device, or for the disk. A layer that ran outside of its hook would compute with nothing.
"""

import accelerate
import pytest
import torch
from diffusers.hooks import apply_group_offloading
from peft import LoraConfig
from rounding import assert_close
from tiny import seeded, tiny_encoder, tiny_pipeline, tiny_transformer

from transdiff_pipelines import (
    ARConditionEncoder,
    TransDiffImg2ImgPipeline,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)
from transdiff_pipelines.pipelines.hooks import has_hooked_parts


CPU = torch.device("cpu")


def run(pipe, **kwargs):
    return pipe([1, 4], num_inference_steps=2, generator=seeded(), output_type="latent", **kwargs).images


@pytest.fixture
def pipe():
    return tiny_pipeline()


class TestOffloading:
    def test_sequential_offload(self, pipe):
        """What `enable_sequential_cpu_offload` does to each model: weights are there while their layer runs."""
        expected, image = run(pipe), pipe(0, num_inference_steps=1, generator=seeded(), output_type="pt").images
        for model in (pipe.condition_encoder, pipe.transformer, pipe.vae):
            accelerate.cpu_offload(model, CPU)
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert_close(run(pipe), expected)
        assert_close(pipe(0, num_inference_steps=1, generator=seeded(), output_type="pt").images, image)

    def test_model_offload_moves_models_by_their_hooks(self, pipe):
        """`enable_model_cpu_offload` hooks the whole models; the projection of the condition is such a call too."""
        expected, order = run(pipe), []

        class Recorder(accelerate.hooks.ModelHook):
            def __init__(self, name):
                self.name = name

            def pre_forward(self, module, *args, **kwargs):
                order.append(self.name)
                return args, kwargs

        for name in ("condition_encoder", "transformer"):
            accelerate.hooks.add_hook_to_module(getattr(pipe, name), Recorder(name))
        assert torch.equal(run(pipe), expected)
        # One image: the condition is encoded, projected, then used in each of two steps.
        assert order == ["condition_encoder", "transformer", "transformer", "transformer"] * 4
        assert pipe.model_cpu_offload_seq == "condition_encoder->transformer->vae"

    @pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
    def test_group_offload(self, pipe, offload_type, tmp_path):
        expected = run(pipe)
        for name in ("condition_encoder", "transformer"):
            apply_group_offloading(
                getattr(pipe, name),
                onload_device=CPU,
                offload_device=CPU,
                offload_type=offload_type,
                num_blocks_per_group=1 if offload_type == "block_level" else None,
                offload_to_disk_path=str(tmp_path / name),
            )
        assert list(tmp_path.rglob("*.safetensors"))
        for _ in range(2):
            assert_close(run(pipe), expected)

    def test_hooks_on_parts_are_seen(self, pipe):
        assert not has_hooked_parts(pipe.transformer)
        with pipe.transformer.cache_context("no hook, only a registry"):
            assert not has_hooked_parts(pipe.transformer)
        accelerate.cpu_offload(pipe.transformer, CPU)
        assert has_hooked_parts(pipe.transformer)


class TestDeviceMap:
    @pytest.mark.parametrize(
        ("model", "cls"),
        [(tiny_encoder(), ARConditionEncoder), (tiny_transformer(), TransDiffTransformer2DModel)],
    )
    def test_blocks_are_not_split(self, model, cls, tmp_path):
        model.save_pretrained(tmp_path)
        size = sum(parameter.nbytes for parameter in model.parameters())
        loaded = cls.from_pretrained(
            tmp_path, device_map="auto", max_memory={"cpu": int(size * 0.8)}, offload_folder=tmp_path / "offload"
        )
        places = loaded.hf_device_map
        assert set(places.values()) == {"cpu", "disk"}
        # A block is in one place, whole.
        assert all(name.count(".") <= 1 for name in places if name.startswith("transformer_blocks"))

    def test_a_pipeline_with_blocks_on_the_disk(self, pipe, tmp_path):
        expected = run(pipe)
        pipe.save_pretrained(tmp_path)
        size = sum(parameter.nbytes for parameter in pipe.transformer.parameters())
        pipe.transformer = TransDiffTransformer2DModel.from_pretrained(
            tmp_path / "transformer",
            device_map="auto",
            max_memory={"cpu": int(size * 0.8)},
            offload_folder=tmp_path / "offload",
        )
        assert "disk" in pipe.transformer.hf_device_map.values()
        assert_close(run(pipe), expected)

    def test_pipeline(self, pipe, tmp_path):
        expected = run(pipe)
        pipe.save_pretrained(tmp_path)
        loaded = TransDiffPipeline.from_pretrained(tmp_path, device_map="cpu")
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(run(loaded), expected)


class TestLayerwiseCasting:
    def test_small_weights_at_rest_at_a_bounded_error(self, pipe):
        expected = run(pipe)
        for model in (pipe.condition_encoder, pipe.transformer):
            before = sum(parameter.nbytes for parameter in model.parameters())
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
            assert sum(parameter.nbytes for parameter in model.parameters()) < 0.5 * before
        error = ((run(pipe) - expected).norm() / expected.norm()).item()
        assert 0 < error < 0.06  # 0.026 here

    def test_what_numerics_ask_for_stays_as_it_was(self, pipe):
        for model in (pipe.condition_encoder, pipe.transformer):
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        low = {
            name
            for model in (pipe.condition_encoder, pipe.transformer)
            for name, parameter in model.named_parameters()
            if parameter.dtype == torch.float8_e4m3fn
        }
        assert "transformer_blocks.0.attn1.to_q.weight" in low
        for part in (
            "norm",
            "class_embedding",
            "time_embedding",
            "proj_in",
            "position_embedding",
            "scale_shift_table",
        ):
            assert not [name for name in low if part in name], part


class TestReentrancy:
    """A call that was interrupted or failed leaves nothing behind."""

    @pytest.mark.parametrize("step", [0, 2, 7])
    def test_a_callback_that_raises(self, pipe, step):
        expected = run(pipe)
        running = dict(vars(pipe))

        def fail(pipe, i, timestep, tensors):
            if i == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run(pipe, callback_on_step_end=fail, guidance_scale=1.7, attention_kwargs={"scale": 0.5})
        assert pipe.current_timestep is None
        assert pipe.current_ar_step is None
        assert pipe.attention_kwargs is None
        assert vars(pipe).keys() == running.keys()
        assert torch.equal(run(pipe), expected)

    def test_an_interrupted_call(self, pipe):
        expected = run(pipe)

        def interrupt(pipe, i, timestep, tensors):
            pipe._interrupt = i == 2

        run(pipe, callback_on_step_end=interrupt)
        assert torch.equal(run(pipe), expected)

    @pytest.mark.parametrize("component", ["condition_encoder", "transformer"])
    def test_a_model_that_fails(self, pipe, component):
        expected, model = run(pipe), getattr(pipe, component)
        calls = iter(range(100))

        def fail(module, inputs):
            if next(calls) == 1:
                raise torch.OutOfMemoryError("no memory")

        handle = model.transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            run(pipe)
        handle.remove()
        assert torch.equal(run(pipe), expected)

    def test_offloaded_models_go_back_after_a_failure(self, pipe, monkeypatch):
        freed = []
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

        def fail(pipe, i, timestep, tensors):
            raise RuntimeError("stop here")

        with pytest.raises(RuntimeError, match="stop here"):
            run(pipe, callback_on_step_end=fail)
        assert freed

    @pytest.mark.parametrize("part", ["decode_latents", "prepare_latents", "encode_image"])
    @pytest.mark.parametrize("editing", [False, True])
    def test_and_after_one_outside_the_loop(self, pipe, monkeypatch, part, editing):
        freed, image = [], torch.rand(1, 3, 8, 8)
        pipe = TransDiffImg2ImgPipeline.from_pipe(pipe) if editing else pipe
        monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))

        def fail(*args, **kwargs):
            raise torch.OutOfMemoryError("no memory")

        monkeypatch.setattr(pipe, part, fail)
        arguments = {"image": image} if editing else {"reference_images": [image[0]]}
        with pytest.raises(torch.OutOfMemoryError):
            pipe(class_labels=0, num_inference_steps=1, **arguments)
        assert freed

    def test_a_lora_scale_does_not_outlive_a_failed_forward(self):
        transformer = tiny_transformer()
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        x, condition = torch.randn(1, 4, 4, 4, generator=seeded()), torch.randn(1, 4, 16, generator=seeded(1))
        expected = transformer(x, 500.0, condition).sample
        with pytest.raises(RuntimeError):
            transformer(x, 500.0, condition[..., :3], attention_kwargs={"scale": 0.5})
        assert torch.equal(transformer(x, 500.0, condition).sample, expected)
