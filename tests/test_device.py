"""What only a GPU shows: the recorded numbers on it, half precision, kernels, memory that comes and goes.

Skipped without one; `make gpu` runs these first.
"""

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from rounding import assert_close
from tiny import seeded, tiny_pipeline

from benchmarks.on_gpu.correctness import TOLERANCE, exact_float32
from benchmarks.on_gpu.training import run_config
from benchmarks.precision import error_to_recorded, golden_runs
from benchmarks.training import Draws, StepSetting, training_model
from training.distributed.engine import ReplicatedEngine
from transdiff_pipelines import TransDiffImg2ImgPipeline, TransDiffPipeline
from transdiff_pipelines.presets import published_model


pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def float32_is_float32():
    precision, tf32 = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    exact_float32()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = tf32


def run(pipe: TransDiffPipeline, **arguments) -> torch.Tensor:
    arguments = {"num_inference_steps": 3, "generator": seeded(), "output_type": "latent", **arguments}
    return pipe([1, 4], **arguments).images.cpu()


def test_the_authors_trajectories() -> None:
    errors = {golden.name: error_to_recorded(golden) for golden in golden_runs(CUDA)}
    assert len(errors) > 3
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_generator_on_the_cpu_gives_the_images_of_the_cpu(patch_size: int) -> None:
    assert_close(run(tiny_pipeline(patch_size).to(CUDA)), run(tiny_pipeline(patch_size)))


def test_a_generator_on_the_device_repeats_itself() -> None:
    pipe = tiny_pipeline().to(CUDA)
    images = [run(pipe, generator=torch.Generator(CUDA).manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_every_output_type(output_type: str) -> None:
    pipe = tiny_pipeline(1).to(CUDA)
    assert len(pipe([0, 3], num_inference_steps=2, output_type=output_type).images) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    expected = run(tiny_pipeline().to(CUDA))
    error = (run(tiny_pipeline().to(CUDA, dtype)) - expected).norm() / expected.norm()
    assert 0 < error < 0.1


def test_another_scheduler_and_an_edit() -> None:
    pipe = tiny_pipeline().to(CUDA)
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    assert run(pipe).isfinite().all()
    picture = torch.rand(1, 3, pipe.image_side, pipe.image_side, generator=seeded(4))
    edited = TransDiffImg2ImgPipeline.from_pipe(pipe)(picture, 0, strength=0.5, output_type="pt").images
    assert edited.isfinite().all()


@pytest.mark.parametrize("compiled", ["on", "reduce-overhead"])
def test_compiled_with_kernels(compiled: str) -> None:
    from benchmarks.common.peers import Setting, compile_networks

    pipe = tiny_pipeline(1).to(CUDA)
    expected = run(pipe)
    compile_networks(pipe, Setting(published_model("transdiff_b"), 2, 3, torch.float32, compiled, CUDA))
    for _ in range(3):  # CUDA graphs are recorded in the second call
        assert_close(run(pipe), expected)
    torch.compiler.reset()


def test_offloaded_models_make_the_same_images_and_leave() -> None:
    expected = run(tiny_pipeline().to(CUDA))
    pipe = tiny_pipeline()
    pipe.enable_model_cpu_offload(device=CUDA)
    assert_close(run(pipe), expected)
    assert {part.device.type for part in (pipe.condition_encoder, pipe.transformer)} == {"cpu"}


def test_training_steps_in_bfloat16() -> None:
    from dataclasses import replace

    from accelerate import Accelerator

    from benchmarks.common.peers import random_components
    from benchmarks.on_gpu.common import TINY

    model = replace(published_model("transdiff_b_mrar"), size=TINY, num_classes=5)
    setting = StepSetting(model, 2, CUDA, torch.bfloat16)
    module = training_model(*random_components(model, device=CUDA), model)
    engine = ReplicatedEngine(module, run_config(setting, "no"), Accelerator(mixed_precision="bf16"))
    draws, losses = Draws(model, 2, CUDA), []
    for _ in range(20):
        with engine.accumulating():
            with engine.accelerator.autocast():
                loss = engine.model(**draws.batch()).mean()
            engine.backward(loss)
        assert engine.step().stepped
        losses.append(loss.item())
    assert losses[-1] < losses[0]
