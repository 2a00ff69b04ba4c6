"""One pipeline, several threads: each call has its own state, and a call that cannot have it is refused.

The calls wait for each other after their first step, so that all of them are under way at once.
"""

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import accelerate
import diffusers
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchHeunDiscreteScheduler, UniPCMultistepScheduler
from peft import LoraConfig
from PIL import Image
from tiny import seeded, tiny_pipeline

from transdiff_pipelines import (
    FlowMatchSDEMultistepScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
)
from transdiff_pipelines.generation import GenerationSettings, draw
from transdiff_pipelines.pipelines.checks import FLOW_SCHEDULERS


SDE_SCHEDULERS = ("FlowMatchEulerMaruyamaScheduler", "FlowMatchSDEMultistepScheduler")
STEPS = 4
WAIT = 60  # seconds after which a thread that waits for the others gives up


class Meeting:
    """A callback at whose first call everyone waits for all others."""

    def __init__(self, number, then=None):
        self.barrier, self.then = threading.Barrier(number), then

    def __call__(self, pipe, step, timestep, tensors):
        if step == 0:
            self.barrier.wait(WAIT)
        return self.then(pipe, step, timestep, tensors) if self.then else {}


def at_once(calls):
    """The results of functions of a callback, all of them under way at the same time."""
    meeting = Meeting(len(calls))
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call, meeting) for call in calls]]


def one_by_one(calls):
    return [call(Meeting(1)) for call in calls]


def check_same(calls):
    """Run at once and one by one: the same bits, and the results differ from each other."""
    together, alone = at_once(calls), one_by_one(calls)
    for result, expected in zip(together, alone, strict=True):
        assert torch.equal(result, expected)
    assert len({result.numpy().tobytes() for result in alone}) == len(calls)


def call(pipe, label, seed, **arguments):
    arguments = {"num_inference_steps": STEPS, "output_type": "latent"} | arguments
    return lambda callback: pipe(label, generator=seeded(seed), callback_on_step_end=callback, **arguments).images


@pytest.mark.parametrize("patch_size", [1, 2])
def test_ten_calls_at_once_give_the_images_of_ten_calls_in_turn(patch_size):
    pipe = tiny_pipeline(patch_size)
    check_same([call(pipe, seed % 5, seed) for seed in range(10)])


@pytest.mark.parametrize(
    "name", ["FlowMatchEulerMaruyamaScheduler", "FlowMatchSDEMultistepScheduler", *FLOW_SCHEDULERS]
)
def test_every_scheduler(name):
    pipe = tiny_pipeline()
    own = {} if name.startswith("LTX") else pipe.scheduler.config
    pipe.scheduler = getattr(diffusers, name).from_config(own)
    check_same([call(pipe, [1, 4], seed, num_inference_steps=3 + seed) for seed in range(3)])


def test_calls_that_have_nothing_in_common():
    """Steps, guidance, classes, references, given conditions, two ways of editing: on one pipeline's components."""
    pipe = tiny_pipeline()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8))
    mask = Image.fromarray(np.eye(8, dtype=np.uint8) * 255)
    change, inpaint = (cls.from_pipe(pipe) for cls in (TransDiffImg2ImgPipeline, TransDiffInpaintPipeline))
    options = {"num_inference_steps": 6, "output_type": "latent"}
    check_same([
        call(pipe, 1, 0, num_inference_steps=3, guidance_scale=[1.0, 2.0, 1.0, 3.0]),
        call(pipe, 1, 1, num_inference_steps=7, guidance_scale=1.0),
        call(pipe, [2, 3], 2, guidance_interval=(0.2, 0.7)),
        call(pipe, 4, 3, reference_images=[image], num_ar_steps=3),
        call(pipe, None, 4, condition_embeds=lambda images: pipe.encode_condition(2, images), guidance_scale=1.5),
        lambda callback: change(image, 3, generator=seeded(5), callback_on_step_end=callback, **options).images,
        lambda callback: inpaint(
            image, mask, 2, generator=seeded(6), callback_on_step_end=callback,
            jump_length=2, jump_n_sample=2, **options,
        ).images,
    ])  # fmt: skip


def test_a_callback_sees_its_own_call():
    pipe = tiny_pipeline()
    own = pipe.scheduler
    seen = {}

    def watch(pipe, step, timestep, tensors):
        state = (pipe.current_ar_step, pipe.guidance_scale, pipe.num_timesteps, len(pipe.scheduler.timesteps))
        assert pipe.current_timestep == timestep == pipe.scheduler.timesteps[step % state[-1]]
        assert pipe.attention_kwargs == {"scale": state[-1]}
        seen.setdefault(state[-1], []).append((step, *state[:-1]))
        pipe._guidance_scale += 1.0
        pipe._interrupt = state[-1] == 3 and step == 4
        return {}

    meeting = Meeting(3, watch)
    with ThreadPoolExecutor(3) as threads:
        for steps in (2, 3, 5):
            options = {
                "num_inference_steps": steps,
                "guidance_scale": float(steps),
                "attention_kwargs": {"scale": float(steps)},
            }
            threads.submit(call(pipe, 1, steps, **options), meeting)
    expected = {
        steps: [(step, step // steps, steps + step, 4 * steps) for step in range(5 if steps == 3 else 4 * steps)]
        for steps in (2, 3, 5)
    }
    assert seen == expected
    assert pipe.scheduler is own
    assert (pipe.current_ar_step, pipe.current_timestep, pipe.attention_kwargs) == (None, None, None)


def test_the_last_call_can_be_looked_at():
    pipe = tiny_pipeline()
    own = pipe.scheduler
    for steps in (2, 3):
        call(pipe, 1, 0, num_inference_steps=steps, guidance_scale=float(steps))(lambda *_: {})
        assert pipe.scheduler is own
        assert len(own.timesteps) == steps
        assert (pipe.num_timesteps, pipe.guidance_scale) == (4 * steps, steps)


def test_another_thread_can_watch_and_end_a_call():
    """As a web page's stop button does."""
    pipe = tiny_pipeline()
    begun, stopped = threading.Event(), threading.Event()
    steps = []

    def wait(pipe, step, timestep, tensors):
        steps.append(step)
        begun.set()
        assert stopped.wait(WAIT)
        return {}

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(call(pipe, 1, 0), wait)
        assert begun.wait(WAIT)
        assert (pipe.num_timesteps, pipe.current_ar_step) == (4 * STEPS, 0)
        pipe._interrupt = True
        stopped.set()
        running.result()
    assert steps == [0]


def test_a_callback_may_call_the_pipeline():
    pipe = tiny_pipeline()
    expected, preview = call(pipe, 1, 0)(None), call(pipe, 2, 7, num_inference_steps=2)(None)

    def look(pipe, step, timestep, tensors):
        before = (pipe.scheduler, pipe.num_timesteps, pipe.current_ar_step)
        if step == 5:
            assert torch.equal(call(pipe, 2, 7, num_inference_steps=2)(None), preview)
        assert (
            (pipe.scheduler, pipe.num_timesteps, pipe.current_ar_step) == before == (before[0], 4 * STEPS, step // 4)
        )
        return {}

    assert torch.equal(call(pipe, 1, 0)(look), expected)


def test_a_scheduler_that_is_swapped_meanwhile_is_for_later_calls():
    pipe = tiny_pipeline()
    expected = call(pipe, 1, 0)(None)
    swapped, begun = UniPCMultistepScheduler.from_config(pipe.scheduler.config), threading.Barrier(2)

    def wait(pipe, step, timestep, tensors):
        if step == 0:
            begun.wait(WAIT)
            begun.wait(WAIT)
        return {}

    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(call(pipe, 1, 0), wait)
        begun.wait(WAIT)
        pipe.scheduler = swapped
        begun.wait(WAIT)
        assert torch.equal(running.result(), expected)
    assert pipe.scheduler is swapped
    assert pipe.config.scheduler == ("diffusers", "UniPCMultistepScheduler")


def test_drawn_settings_keep_to_their_own_scheduler():
    """`draw` puts another scheduler in, which no other call may see."""
    pipe = tiny_pipeline()
    own = pipe.scheduler

    def drawing(name, seed):
        settings = GenerationSettings(labels=(1,), seed=seed, num_inference_steps=3, scheduler=name, batch_size=1)
        return lambda callback: torch.from_numpy(np.asarray(next(draw(pipe, settings, callback))).astype(np.float32))

    names = ("euler-maruyama", "sde-multistep", "heun", "unipc", None)
    check_same([drawing(name, seed) for seed, name in enumerate(names)])
    assert pipe.scheduler is own


def test_copies_and_pickles_of_a_used_pipeline():
    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchSDEMultistepScheduler.from_config(pipe.scheduler.config)
    expected = call(pipe, 1, 0)(None)
    for twin in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        twin.set_progress_bar_config(disable=True)
        assert torch.equal(call(twin, 1, 0)(None), expected)
        twin.scheduler = FlowMatchHeunDiscreteScheduler.from_config(twin.scheduler.config)
        assert isinstance(pipe.scheduler, FlowMatchSDEMultistepScheduler)


def with_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))


def with_model_offload(pipe):
    for model in (pipe.condition_encoder, pipe.transformer, pipe.vae):
        accelerate.cpu_offload_with_hook(model, torch.device("cpu"))


def with_sequential_offload(pipe):
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))


def with_layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)


def with_lora(pipe):
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


class TestRefusal:
    @pytest.mark.parametrize(
        ("prepare", "arguments", "message"),
        [
            (with_cache, {}, "the cache of TransDiffTransformer2DModel"),
            (with_model_offload, {}, "offloading"),
            (with_sequential_offload, {}, "offloading"),
            (with_layerwise_casting, {}, "layerwise casting"),
            (with_lora, {"attention_kwargs": {"scale": 0.5}}, "attention_kwargs={'scale': 0.5}"),
        ],
    )
    def test_models_that_hold_the_state_of_one_call(self, prepare, arguments, message):
        """The second call is refused in words; the first goes on unharmed, and so do later ones."""
        pipe = tiny_pipeline()
        prepare(pipe)
        expected = call(pipe, 1, 0, **arguments)(None)
        twin = TransDiffPipeline(**pipe.components)  # the same models under another name
        begun, refused = threading.Event(), threading.Event()

        def wait(pipe, step, timestep, tensors):
            begun.set()
            assert refused.wait(WAIT)
            return {}

        with ThreadPoolExecutor(1) as threads:
            running = threads.submit(call(pipe, 1, 0, **arguments), wait)
            assert begun.wait(WAIT)
            try:
                for other in (pipe, twin):
                    with pytest.raises(RuntimeError, match="overlaps with another one") as error:
                        call(other, 1, 0)(None)
                    assert message in str(error.value)
                    assert "threading.Lock" in str(error.value)
                    call(tiny_pipeline(), 1, 0)(None)  # other models are free
            finally:
                refused.set()
            assert torch.equal(running.result(), expected)
        assert torch.equal(call(pipe, 1, 0, **arguments)(None), expected)

    def test_not_within_a_thread_nor_after_a_failure(self):
        pipe = tiny_pipeline()
        with_sequential_offload(pipe)
        expected = call(pipe, 1, 0)(None)

        def fail(pipe, step, timestep, tensors):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            call(pipe, 1, 0)(fail)
        with ThreadPoolExecutor(1) as threads:
            assert torch.equal(threads.submit(call(pipe, 1, 0), None).result(), expected)

        def look(pipe, step, timestep, tensors):
            if step == 5:
                call(pipe, 2, 1, num_inference_steps=1)(None)
            return {}

        assert torch.equal(call(pipe, 1, 0)(look), expected)

    def test_a_device_map_is_no_obstacle(self):
        """Its hooks move what goes in, not the weights."""
        pipe = tiny_pipeline()
        for name in ("condition_encoder", "transformer"):
            accelerate.dispatch_model(getattr(pipe, name), {"": "cpu"}, main_device="cpu", force_hooks=True)
        check_same([call(pipe, 1, seed) for seed in range(2)])

    def test_an_adapter_without_a_scale_is_no_obstacle(self):
        pipe = tiny_pipeline()
        with_lora(pipe)
        check_same([call(pipe, 1, seed) for seed in range(2)])
