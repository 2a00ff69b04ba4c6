"""Flow maps in the pipelines: every call told where it goes, as many calls as recommended, refusals, editing."""

import itertools
import json

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from diffusers.hooks import apply_faster_cache
from test_caches import CACHES, faster
from test_flow_map import MEAN, STD, flow_map, gaussian_average_velocity
from torch._dynamo.utils import counters

from tests.tiny import CHANNELS, SIDE, seeded, tiny_pipeline
from transdiff_pipelines import (
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
)
from transdiff_pipelines.model_card import pipeline_card


STEPS = 3


def student_pipeline(patch_size=2, cls=TransDiffPipeline, **components):
    parts = {"transformer": flow_map(), "scheduler": FlowMapScheduler(), "num_inference_steps": STEPS}
    pipe = tiny_pipeline(patch_size, **{**parts, **components})
    pipe = pipe if cls is TransDiffPipeline else cls(**pipe.components, num_inference_steps=STEPS, guidance_scale=1.3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents_of(pipe, *arguments, **kwargs):
    return pipe(*arguments, **{"generator": seeded(), "output_type": "latent", **kwargs}).images


def calls_of(transformer):
    """Filled with the (timestep, next timestep) of every call of the model."""
    calls = []

    def record(_, __, given):
        times = (given["timestep"], given.get("next_timestep"))
        calls.append(tuple(None if time is None else time.flatten()[0].item() for time in times))

    transformer.register_forward_pre_hook(record, with_kwargs=True)
    return calls


class TestPipeline:
    @pytest.mark.parametrize("guidance_scale", [1.0, 1.3])
    def test_the_recommended_calls_each_told_where_it_goes(self, guidance_scale):
        pipe = student_pipeline()
        calls = calls_of(pipe.transformer)
        latents_of(pipe, [0, 1], guidance_scale=guidance_scale)
        grid = pytest.approx([1000, 2000 / 3, 1000 / 3])
        assert len(calls) == STEPS * pipe.condition_encoder.num_images
        assert [time for time, _ in calls[:STEPS]] == grid
        assert [time for _, time in calls[:STEPS]] == pytest.approx([2000 / 3, 1000 / 3, 0])
        assert calls == calls[:STEPS] * pipe.condition_encoder.num_images

    def test_the_loop_by_hand_gives_the_same(self):
        pipe = student_pipeline(1)
        noise = torch.randn(2, CHANNELS, SIDE, SIDE, generator=seeded(2))
        result = latents_of(pipe, [0, 3], guidance_scale=1.0, latents=noise)
        condition, x = pipe.encode_condition([0, 3]), noise
        grid = [1.0, 2 / 3, 1 / 3, 0.0]
        with torch.no_grad():
            for t, r in itertools.pairwise(grid):
                x = x - (t - r) * pipe.transformer(x, 1000 * t, condition, next_timestep=1000 * r).sample
        torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("steps", [1, 2, 4])
    def test_exact_where_the_model_is(self, steps, monkeypatch):
        """A model that knows the flow map of Gaussian data gives mean + std noise, whatever the number of calls."""
        pipe = student_pipeline()
        monkeypatch.setattr(
            pipe.transformer,
            "forward",
            lambda hidden_states, timestep, next_timestep, **_: (
                gaussian_average_velocity(hidden_states, timestep.item() / 1000, next_timestep.item() / 1000),
            ),
        )
        noise = torch.randn(2, CHANNELS, SIDE, SIDE, generator=seeded(2))
        result = latents_of(pipe, [0, 1], guidance_scale=1.0, latents=noise, num_inference_steps=steps)
        torch.testing.assert_close(result, MEAN + STD * noise, rtol=0, atol=1e-5)

    def test_the_recommendation_goes_with_the_checkpoint(self, tmp_path):
        pipe = student_pipeline()
        pipe.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.scheduler) is FlowMapScheduler
        assert loaded.config.num_inference_steps == loaded.recommended_num_inference_steps == STEPS
        assert torch.equal(latents_of(loaded, [0, 1]), latents_of(pipe, [0, 1]))
        assert TransDiffImg2ImgPipeline.from_pipe(pipe).recommended_num_inference_steps == STEPS

    def test_the_card_tells_it(self):
        assert "| `num_inference_steps` | 3 | `model_index.json`; an argument" in pipeline_card(
            student_pipeline(), "a/b"
        )
        assert "| `num_inference_steps` | 100 | an argument" in pipeline_card(tiny_pipeline(), "a/b")

    def test_a_checkpoint_that_recommends_nothing_takes_a_hundred_steps(self, tmp_path):
        pipe = tiny_pipeline(1)
        assert pipe.config.num_inference_steps is None
        calls = calls_of(pipe.transformer)
        latents_of(pipe, 0, guidance_scale=1.0)
        assert len(calls) == pipe.recommended_num_inference_steps == 100
        assert {next_time for _, next_time in calls} == {None}
        # one that was saved before there was a recommendation
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text())
        del index["num_inference_steps"]
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert TransDiffPipeline.from_pretrained(tmp_path).recommended_num_inference_steps == 100

    def test_a_velocity_model_may_recommend_steps_too(self):
        pipe = tiny_pipeline(1, num_inference_steps=7)
        calls = calls_of(pipe.transformer)
        latents_of(pipe, 0)
        assert len(calls) == 7
        latents_of(pipe, 0, sigmas=[1.0, 0.5])
        assert len(calls) == 9

    @pytest.mark.parametrize(
        ("steps", "error"), [(0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)]
    )
    def test_a_bad_recommendation(self, steps, error):
        with pytest.raises(error, match="num_inference_steps"):
            student_pipeline(num_inference_steps=steps)

    @pytest.mark.parametrize(
        "scheduler", [FlowMatchEulerMaruyamaScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler]
    )
    def test_under_another_scheduler_it_is_the_velocity_model(self, scheduler):
        pipe, velocity_pipe = student_pipeline(), tiny_pipeline(transformer=flow_map(0))
        for each in (pipe, velocity_pipe):
            each.scheduler = scheduler.from_config(FlowMapScheduler().config)
        assert pipe.recommended_num_inference_steps == 100
        results = [latents_of(each, [0, 1], num_inference_steps=4) for each in (pipe, velocity_pipe)]
        assert torch.equal(*results)

    def test_a_velocity_model_under_its_scheduler_is_refused(self):
        with pytest.raises(ValueError, match="FlowMapScheduler asks for average velocities .* is a velocity model"):
            tiny_pipeline(scheduler=FlowMapScheduler())
        pipe = tiny_pipeline()
        pipe.scheduler = FlowMapScheduler.from_config(pipe.scheduler.config)
        with pytest.raises(ValueError, match="use another scheduler, or a checkpoint trained as a flow map"):
            pipe(0)

    def test_noise_between_calls_comes_from_the_generator(self):
        pipe = student_pipeline(scheduler=FlowMapScheduler(renoise=0.5))
        first = latents_of(pipe, [0, 1])
        assert torch.equal(latents_of(pipe, [0, 1]), first)
        assert not torch.equal(latents_of(student_pipeline(), [0, 1]), first)

    def test_half_precision_keeps_both_times(self):
        pipe = student_pipeline(1).to(torch.bfloat16)
        calls = calls_of(pipe.transformer)
        latents_of(pipe, 0, num_inference_steps=7)
        assert [time for _, time in calls[:-1]] == [time for time, _ in calls[1:]]

    @pytest.mark.parametrize("cache", CACHES)
    def test_caches_on_and_off(self, cache):
        pipe = student_pipeline(1)
        never = latents_of(pipe, [0, 1], num_inference_steps=8)
        (apply_faster_cache if cache is faster else type(pipe.transformer).enable_cache)(pipe.transformer, cache(pipe))
        assert latents_of(pipe, [0, 1], num_inference_steps=8).isfinite().all()
        if cache is not faster:
            pipe.transformer.disable_cache()
            assert torch.equal(latents_of(pipe, [0, 1], num_inference_steps=8), never)

    def test_compiled_once(self):
        torch._dynamo.reset()
        pipe = student_pipeline(1)
        expected = latents_of(pipe, [0, 1])
        pipe.transformer.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(latents_of(pipe, [0, 1]), expected)
        counters.clear()
        latents_of(pipe, [0, 1], num_inference_steps=2)
        assert counters["stats"]["unique_graphs"] == 0
        torch._dynamo.reset()


class TestEditing:
    def picture(self, pipe):
        return torch.rand(1, 3, pipe.image_side, pipe.image_side, generator=seeded(4))

    @pytest.mark.parametrize(("strength", "calls_made"), [(1.0, 4), (0.5, 2), (0.25, 1), (0.0, 0)])
    def test_an_image_is_taken_along_from_the_middle_of_the_grid(self, strength, calls_made):
        pipe = student_pipeline(1, TransDiffImg2ImgPipeline)
        calls = calls_of(pipe.transformer)
        result = latents_of(pipe, self.picture(pipe), 0, strength=strength, num_inference_steps=4)
        assert result.isfinite().all()
        expected = [(1000.0, 750.0), (750.0, 500.0), (500.0, 250.0), (250.0, 0.0)][4 - calls_made :]
        assert calls == expected

    def test_what_is_known_stays_in_inpainting_with_jumps(self):
        pipe = student_pipeline(1, TransDiffInpaintPipeline)
        picture = self.picture(pipe)
        mask = torch.zeros(1, 1, pipe.image_side, pipe.image_side)
        mask[..., : pipe.image_side // 2] = 1
        calls = calls_of(pipe.transformer)
        result = latents_of(
            pipe, picture, mask, 0, num_inference_steps=4, jump_length=1, jump_n_sample=2, output_type="pt"
        )
        assert len(calls) == 7
        known = mask.expand_as(picture) == 0
        torch.testing.assert_close(result[known], picture[known], rtol=0, atol=1e-6)
        assert not torch.allclose(result[~known], picture[~known], atol=0.05)

    def test_the_recommended_steps_are_an_edits_too(self):
        pipe = student_pipeline(1, TransDiffImg2ImgPipeline)
        calls = calls_of(pipe.transformer)
        latents_of(pipe, self.picture(pipe), 0, strength=1.0)
        assert len(calls) == STEPS
