"""Pipelines on a device that is not the CPU: nothing is left behind on the CPU, and no step waits for the device."""

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image


pytest.importorskip("second_device", exc_type=ImportError, reason="this torch cannot be given a device from Python")

from command import run
from rounding import assert_close
from second_device import DEVICE, SecondGenerator, second_device, waits_counted
from test_caches import CACHES
from test_flow_map import flow_map
from test_lora import lora_config
from tiny import CHANNELS, SIDE, seeded, tiny_pipeline

from training.evaluation import quality
from training.experiments import common
from transdiff_pipelines import (
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
    blend_conditions,
)
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.pipelines.checks import FLOW_SCHEDULERS


OWN_SCHEDULERS = (FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler)
SCHEDULERS = [*OWN_SCHEDULERS, *(getattr(diffusers, name) for name in FLOW_SCHEDULERS)]


@pytest.fixture(autouse=True)
def device():
    with second_device() as device:
        yield device


def latents(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, CHANNELS, SIDE, SIDE, generator=seeded(seed))


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def mask() -> Image.Image:
    return Image.fromarray(np.repeat(np.array([[255], [0]], dtype=np.uint8), 4, axis=0).repeat(8, axis=1))


def condition(pipe: TransDiffPipeline) -> torch.Tensor:
    return blend_conditions([pipe.encode_condition(label) for label in (0, 1)], [0.3, 0.7])


def blended(pipe: TransDiffPipeline) -> Callable[[torch.Tensor | None], torch.Tensor]:
    return lambda images: blend_conditions([pipe.encode_condition([label] * 2, images) for label in (0, 1)])


# A call's arguments; those that are functions are called with the pipeline.
CALLS: dict[str, tuple[type[TransDiffPipeline], dict[str, Any]]] = {
    "guided": (TransDiffPipeline, {}),
    "unguided": (TransDiffPipeline, {"guidance_scale": 1.0}),
    "interval": (TransDiffPipeline, {"guidance_interval": (0.2, 0.8)}),
    "sigmas": (TransDiffPipeline, {"sigmas": [1.0, 0.6, 0.2], "num_inference_steps": None}),
    "repeated labels": (TransDiffPipeline, {"num_images_per_label": 2}),
    "labels on the CPU": (TransDiffPipeline, {"class_labels": torch.tensor([0, 3])}),
    "labels on the device": (TransDiffPipeline, {"class_labels": lambda pipe: torch.tensor([0, 3]).to(pipe.device)}),
    "noise on the CPU": (TransDiffPipeline, {"latents": latents(2)}),
    "noise on the device": (TransDiffPipeline, {"latents": lambda pipe: latents(2).to(pipe.device)}),
    "a generator for each": (TransDiffPipeline, {"generator": lambda pipe: [seeded(1), seeded(2)]}),
    "tokens": (TransDiffPipeline, {"class_labels": None, "condition_embeds": condition}),
    "image to image": (TransDiffImg2ImgPipeline, {"image": picture(), "strength": 0.6}),
    "latents to image": (TransDiffImg2ImgPipeline, {"image": latents(2), "strength": 0.6}),
    "pixels on the device": (
        TransDiffImg2ImgPipeline,
        {"image": lambda pipe: torch.rand(1, 3, 8, 8, generator=seeded()).to(pipe.device)},
    ),
    "inpainting with jumps": (
        TransDiffInpaintPipeline,
        {"image": picture(), "mask_image": mask(), "jump_length": 1, "jump_n_sample": 2},
    ),
    "inpainting on the device": (
        TransDiffInpaintPipeline,
        {
            "image": lambda pipe: torch.rand(1, 3, 8, 8, generator=seeded()).to(pipe.device),
            "mask_image": lambda pipe: (torch.arange(8.0) > 3).float().expand(8, 8).to(pipe.device),
        },
    ),
}
SEQUENCES: dict[str, dict[str, Any]] = {
    "a scale for each image": {"guidance_scale": [1.0, 1.2, 1.2, 1.4]},
    "all images": {"return_intermediates": True},
    "part of the sequence": {"num_ar_steps": 2},
    "picture as reference": {"reference_images": [[picture()], [picture()]]},
    "latents as reference": {"reference_images": latents(2, 2)},
    "latents on the device as reference": {"reference_images": lambda pipe: latents(2, 2).to(pipe.device)},
    "a function of the images": {"class_labels": None, "condition_embeds": blended},
}
MRAR_CALLS = {name: (TransDiffPipeline, arguments) for name, arguments in SEQUENCES.items()}


def pipeline(patch_size: int = 2, cls: type[TransDiffPipeline] = TransDiffPipeline, **parts: Any) -> TransDiffPipeline:
    pipe = cls.from_pipe(tiny_pipeline(patch_size, **parts))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(pipe: TransDiffPipeline, **arguments: Any) -> Any:
    """The images of a call; an argument that is a function makes what it stands for with the pipeline."""
    defaults = {"class_labels": [0, 3], "num_inference_steps": 3, "generator": seeded(), "output_type": "pt"}
    made_here = [name for name, value in arguments.items() if callable(value)]
    arguments = {**defaults, **arguments} | {name: arguments[name](pipe) for name in made_here}
    if pipe.__class__ is not TransDiffPipeline:
        arguments["class_labels"] = 0 if isinstance(arguments.get("image"), Image.Image) else [0, 3]
    return pipe(**arguments).images


def waits_of(pipe: TransDiffPipeline, **arguments: Any) -> list[str]:
    with waits_counted() as waits:
        call(pipe, **arguments)
    return waits


def assert_no_step_waits(pipe: TransDiffPipeline, **arguments: Any) -> None:
    """A call waits as often for few steps as for many."""
    arguments["output_type"] = "latent"
    few, many = (waits_of(pipe, **arguments, num_inference_steps=steps) for steps in (3, 5))
    assert len(few) == len(many), "\n".join(many)


@pytest.mark.parametrize("name", CALLS | MRAR_CALLS)
def test_a_call_gives_the_cpu_s_images_and_no_step_waits(name: str) -> None:
    cls, arguments = (CALLS | MRAR_CALLS)[name]
    pipe = pipeline(2 if name in SEQUENCES else 1, cls)
    expected = call(pipe, **arguments)
    found = call(pipe.to(DEVICE), **arguments)
    assert found.device == DEVICE
    assert_close(found.cpu(), expected)
    if "sigmas" not in arguments:
        assert_no_step_waits(pipe, **arguments)


@pytest.mark.parametrize("cls", [TransDiffImg2ImgPipeline, TransDiffInpaintPipeline])
def test_editing_a_sequence(cls: type[TransDiffPipeline]) -> None:
    pipe = pipeline(2, cls)
    arguments = {"image": picture()} | ({"mask_image": mask()} if cls is TransDiffInpaintPipeline else {})
    expected = call(pipe, **arguments)
    assert_close(call(pipe.to(DEVICE), **arguments).cpu(), expected)


def test_a_longer_sequence_waits_no_more_often() -> None:
    pipe = pipeline().to(DEVICE)
    short, long = (waits_of(pipe, num_ar_steps=images, output_type="latent") for images in (2, 4))
    assert len(short) == len(long), "\n".join(long)


# What diffusers' own schedulers wait for at every step.
WAITING = {
    "UniPCMultistepScheduler": "it puts its coefficients on the device",
    "LTXEulerAncestralRFScheduler": "it asks whether the next sigma, which it has on the device, is 0",
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler(scheduler: type) -> None:
    pipe = pipeline(1)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = call(pipe)
    assert_close(call(pipe.to(DEVICE)).cpu(), expected)
    if scheduler.__name__ not in WAITING:
        assert_no_step_waits(pipe)


@pytest.mark.parametrize("cls", [TransDiffPipeline, TransDiffImg2ImgPipeline])
def test_a_flow_map(cls: type[TransDiffPipeline]) -> None:
    pipe = pipeline(2, cls, transformer=flow_map(), scheduler=FlowMapScheduler(renoise=0.5))
    arguments = {} if cls is TransDiffPipeline else {"image": picture()}
    expected = call(pipe, **arguments)
    assert_close(call(pipe.to(DEVICE), **arguments).cpu(), expected)
    assert_no_step_waits(pipe, **arguments)


@pytest.mark.parametrize("scheduler", OWN_SCHEDULERS)
def test_generators_of_the_device(scheduler: type) -> None:
    """They give other numbers than the CPU's on a GPU; here the kernels, and so the numbers, are the same."""
    pipe = pipeline(1)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    expected = call(pipe, generator=lambda pipe: [seeded(1), seeded(2)])
    on_device = [SecondGenerator().manual_seed(seed) for seed in (1, 2)]
    assert_close(call(pipe.to(DEVICE), generator=on_device).cpu(), expected)
    assert_no_step_waits(pipe, generator=lambda _: SecondGenerator().manual_seed(0))
    assert call(pipe, generator=None).isfinite().all()


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_output_types(output_type: str) -> None:
    images = call(pipeline(1).to(DEVICE), output_type=output_type, return_intermediates=True)
    assert len(images) == 2
    if output_type in ("pt", "latent"):
        assert images.device == DEVICE


def test_lora_and_its_weight() -> None:
    pipe = pipeline(2)
    for model in (pipe.condition_encoder, pipe.transformer):
        model.add_adapter(lora_config())
    arguments = {"attention_kwargs": {"scale": 0.5}}
    expected = call(pipe, **arguments)
    assert_close(call(pipe.to(DEVICE), **arguments).cpu(), expected)
    pipe.fuse_lora(components=["condition_encoder", "transformer"], lora_scale=0.5)
    assert_close(call(pipe).cpu(), expected)


def test_weights_that_are_loaded_onto_the_device(tmp_path) -> None:
    pipe = pipeline(2)
    pipe.save_pretrained(tmp_path)
    loaded = TransDiffPipeline.from_pretrained(tmp_path).to(DEVICE)
    loaded.set_progress_bar_config(disable=True)
    assert_close(call(loaded).cpu(), call(pipe))
    loaded.save_pretrained(tmp_path / "again")
    again = TransDiffPipeline.from_pretrained(tmp_path / "again")
    assert torch.equal(again.transformer.proj_out.weight, pipe.transformer.proj_out.weight)


def test_offloading_brings_each_network_there_and_back() -> None:
    pipe = pipeline(2)
    expected = call(pipe)
    pipe.enable_model_cpu_offload(device=DEVICE)
    assert_close(call(pipe).cpu(), expected)
    for name, network in pipe.components.items():
        if isinstance(network, torch.nn.Module):
            assert network.device.type == "cpu", name


def test_commands_draw_there_unless_told_otherwise(tmp_path) -> None:
    pipeline(1).save_pretrained(tmp_path / "model")
    pixels = {}
    for device, option in (("accelerator", []), ("cpu", ["--device", "cpu"])):
        output = tmp_path / f"{device}.png"
        result = run("generate", 0, "--model", tmp_path / "model", "--steps", 2, "--output", output, *option)
        assert result.exit_code == 0, result.output
        pixels[device] = np.asarray(Image.open(output), dtype=float)
    assert np.abs(pixels["accelerator"] - pixels["cpu"]).max() <= 1
    assert best_device().type == DEVICE.type
    options = argparse.Namespace(
        model=str(tmp_path / "model"), dtype="float32", scheduler=None, output=tmp_path / "out"
    )
    options.drift_scale = options.diffusion_scale = None
    assert quality.load_pipeline(options).device.type == DEVICE.type
    assert common.load(options).device.type == DEVICE.type


@pytest.mark.parametrize("cache", CACHES)
def test_approximating_caches(cache: Callable[[TransDiffPipeline], Any]) -> None:
    pipe = pipeline(1)
    pipe.transformer.enable_cache(cache(pipe))
    expected = call(pipe)
    assert_close(call(pipe.to(DEVICE)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["guided", "tokens", "image to image", "inpainting with jumps", "picture as reference"]
)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Dtypes meet rightly, and the images are those of float32 but for a few hundredths."""
    cls, arguments = (CALLS | MRAR_CALLS)[name]
    pipe = pipeline(2 if name in SEQUENCES else 1, cls)
    expected = call(pipe, **arguments)
    found = call(pipe.to(DEVICE, dtype), **arguments)
    torch.testing.assert_close(found.cpu().float(), expected, atol=0.05, rtol=0)


def test_the_device_is_strict_and_notes_waits() -> None:
    """What the other tests rest on."""
    here, there = torch.ones(2), torch.ones(2, device=DEVICE)
    with pytest.raises(RuntimeError, match="all tensors must be on elsewhere:0"):
        here + there
    with pytest.raises(RuntimeError, match="expected a generator on elsewhere:0"):
        torch.randn(2, device=DEVICE, generator=seeded())
    quiet = [lambda: there * 2, lambda: here.to(DEVICE, non_blocking=True), lambda: there + torch.tensor(1.0)]
    reads = [lambda: there.sum().item(), there.tolist, lambda: bool((there > 0).all()), lambda: float(there[0])]
    copies = [
        lambda: there.to("cpu", non_blocking=True),
        lambda: here.to(DEVICE),
        lambda: torch.tensor([1], device=DEVICE),
    ]
    indices = [lambda: there[there > 0], lambda: there[torch.tensor([0])], there.nonzero]
    waiting = [*reads, *copies, *indices, torch.accelerator.synchronize]
    for operations, count in ((quiet, 0), (waiting, 1)):
        for operation in operations:
            with waits_counted() as waits:
                operation()
            assert len(waits) == count, waits
