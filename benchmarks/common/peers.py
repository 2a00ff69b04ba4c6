"""What is timed side by side: our pipeline, the released code, diffusers' DiT-XL/2; all with random weights.

Every peer goes from class labels to latents. Decoding is left out here: the VAE is the same for us and the released
code, and another one for DiT; it has a number of its own in the results.
"""

import copy
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn

from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
    convert_original_checkpoint,
)
from transdiff_pipelines.presets import VAE_SCALING_FACTOR, PublishedModel

from .reference import ReleasedModel


CPU = torch.device("cpu")

# The sizes of DiT-XL/2 at 256 px. Its paper and its authors' sampling script use 250 steps; diffusers' pipeline, 50.
DIT_XL_2 = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}
# The same, tiny: for a rehearsal of a command, whose times mean nothing.
TINY_DIT = DIT_XL_2 | {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
DIT_STEPS = 250
TRANSDIFF_STEPS = 100

COMPILE_MODES = ("off", "on", "reduce-overhead", "max-autotune")
"""Nothing; the repeated blocks of both networks; these, and the denoising network as a whole, in one of
`torch.compile`'s modes that use CUDA graphs."""


@dataclass(frozen=True)
class Setting:
    """What to run. `steps` are those measured, for each image of an AR sequence; `compiled` is one of `COMPILE_MODES`.

    With `tiny` the VAE and DiT are tiny too.
    """

    model: PublishedModel
    batch_size: int
    steps: int
    dtype: torch.dtype
    compiled: str
    device: torch.device
    tiny: bool = False

    @property
    def labels(self) -> list[int]:
        """Different classes, as far as there are so many: equal ones would share their condition."""
        return [(7 * number + 3) % self.model.num_classes for number in range(self.batch_size)]


class Peer:
    """Something that makes latents from labels."""

    name: str
    setting: Setting
    full_steps = TRANSDIFF_STEPS
    load_seconds: float | None = None
    compiled = "off"

    @property
    def network(self) -> nn.Module:
        """The denoising network, called once a step."""
        raise NotImplementedError

    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        raise NotImplementedError

    def sample(self, steps: int) -> torch.Tensor:
        """Latents of the setting's labels."""
        raise NotImplementedError


class OurPipeline(Peer):
    """`TransDiffPipeline` with the published sampling settings."""

    name = "transdiff_pipelines"

    def __init__(self, setting: Setting, pipeline: TransDiffPipeline):
        self.setting, self.pipeline, self.compiled = setting, pipeline.to(setting.device), setting.compiled
        pipeline.set_progress_bar_config(disable=True)
        compile_networks(pipeline, setting)

    @property
    def network(self) -> nn.Module:
        return self.pipeline.transformer

    def weight_bytes(self) -> int:
        return _bytes(self.pipeline.condition_encoder) + _bytes(self.pipeline.transformer)

    def sample(self, steps: int) -> torch.Tensor:
        return self.pipeline(self.setting.labels, num_inference_steps=steps, output_type="latent").images

    def sample_with_noise(self, noise: torch.Tensor, step_noise: list[torch.Tensor]) -> torch.Tensor:
        """`sample` with recorded noise `(B, C, s, s)`: the initial one, and that of every step but an image's last."""
        num_steps = len(step_noise) // self.setting.model.num_images + 1
        with recorded_step_noise(self.pipeline, iter(step_noise)):
            return self.pipeline(
                self.setting.labels, num_inference_steps=num_steps, latents=noise, output_type="latent"
            ).images


def compile_networks(pipeline: TransDiffPipeline, setting: Setting) -> None:
    """Compile as the setting says, in place."""
    if setting.compiled == "off":
        return
    pipeline.condition_encoder.compile_repeated_blocks(fullgraph=True)
    transformer: Any = pipeline.transformer  # whose forward is replaced below
    if setting.compiled == "on":
        transformer.compile_repeated_blocks(fullgraph=True)
        return
    # The encoder keeps keys and values from one call to the next, which CUDA graphs would overwrite. Of the network
    # the forward is compiled, not the call: hooks that read the time stay outside.
    transformer.forward = torch.compile(transformer.forward, fullgraph=True, mode=setting.compiled)


@contextmanager
def recorded_step_noise(pipeline: TransDiffPipeline, draws: Iterator[torch.Tensor]) -> Iterator[None]:
    """Make a pipeline's scheduler take each step's noise from `draws`; the last step of an image takes none."""
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step

    def step_with_noise(
        model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, **kwargs: Any
    ) -> Any:
        noise = None if timestep == scheduler.timesteps[-1] else next(draws)
        return step(model_output, timestep, sample, variance_noise=noise, **kwargs)

    with mock.patch.object(scheduler, "step", step_with_noise):
        yield


class OurFloat32(OurPipeline):
    """Ours in float32, beside ours in a half precision: the weights before they were rounded."""

    name = "transdiff_pipelines, float32"


class FlowMapStudent(OurPipeline):
    """Ours with a flow map in the decoder's place, which makes an image with `calls` calls, always."""

    def __init__(self, setting: Setting, pipeline: TransDiffPipeline, calls: int):
        super().__init__(setting, pipeline)
        self.name, self.full_steps = f"flow map, calls an image: {calls}", calls


STUDENT_CALLS = (4, 1)


def flow_map_students(setting: Setting, calls: Sequence[int] = STUDENT_CALLS) -> list[Peer]:
    """Students with random weights, one for each number of calls; the decoder's size says all about their time."""
    layers = (setting.model.size.decoder_layers + 1) // 2
    pipeline = random_pipeline(setting.model, device=setting.device, tiny=setting.tiny, flow_map_layers=layers)
    pipeline.to(setting.dtype)
    return [FlowMapStudent(setting, pipeline, number) for number in calls]


class ReleasedCode(Peer):
    """The authors' code, see `reference.py`; never compiled, as it was released."""

    name = "released code"

    def __init__(self, setting: Setting, model: ReleasedModel):
        self.setting, self.model = setting, model

    @property
    def network(self) -> nn.Module:
        return self.model.network

    def weight_bytes(self) -> int:
        return _bytes(self.model.module)

    def sample(self, steps: int) -> torch.Tensor:
        return self.model.sample(self.setting.labels, steps)

    def sample_with_noise(self, noise: torch.Tensor, step_noise: list[torch.Tensor]) -> torch.Tensor:
        """`sample` with recorded noise."""
        return self.model.sample_with_noise(self.setting.labels, noise, step_noise)


class DiT(Peer):
    """diffusers' `DiTPipeline` with a model of the size of DiT-XL/2 and the pipeline's own guidance."""

    name = "diffusers DiT-XL/2"
    full_steps = DIT_STEPS

    def __init__(self, setting: Setting):
        start = time.perf_counter()
        self.setting = setting
        with setting.device:
            transformer = DiTTransformer2DModel(**(TINY_DIT if setting.tiny else DIT_XL_2))
        transformer.to(setting.device, setting.dtype).eval()
        # DiTPipeline always decodes its latents. With this tiny VAE that costs next to nothing.
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(4,), norm_num_groups=4)
        self.pipeline = DiTPipeline(transformer, vae.to(setting.device, setting.dtype), DDIMScheduler())
        self.pipeline.set_progress_bar_config(disable=True)
        if setting.compiled != "off":
            self.compiled = "on"
            for block in transformer.transformer_blocks:  # diffusers does not list them as repeated blocks
                block.compile()
        self.load_seconds = time.perf_counter() - start

    @property
    def network(self) -> nn.Module:
        return self.pipeline.transformer

    def weight_bytes(self) -> int:
        return _bytes(self.pipeline.transformer)

    def sample(self, steps: int) -> torch.Tensor:
        return torch.as_tensor(self.pipeline(self.setting.labels, num_inference_steps=steps, output_type="pt").images)


def _bytes(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def vae_of_published_size(tiny: bool = False) -> AutoencoderKL:
    """The KL-16 autoencoder of all published models, with random weights; `tiny` has 8 channels in every layer."""
    return AutoencoderKL(
        block_out_channels=(8,) * 5 if tiny else (128, 128, 256, 256, 512),
        norm_num_groups=8 if tiny else 32,
        down_block_types=("DownEncoderBlock2D",) * 4 + ("AttnDownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",) * 5,
        layers_per_block=2,
        latent_channels=16,
        sample_size=256,
        scaling_factor=VAE_SCALING_FACTOR,
    ).eval()


def random_components(
    model: PublishedModel, seed: int = 0, device: torch.device = CPU, flow_map_layers: int = 0
) -> tuple[ARConditionEncoder, TransDiffTransformer2DModel]:
    """Our networks of a published size with random weights, none of them zero; they are drawn on the device."""
    torch.manual_seed(seed)
    with device:
        transformer = TransDiffTransformer2DModel(**model.transformer_config(), num_flow_map_layers=flow_map_layers)
        nn.init.normal_(transformer.proj_out.weight, std=0.02)
        return ARConditionEncoder(**model.encoder_config()).eval(), transformer.eval()


def random_pipeline(
    model: PublishedModel, seed: int = 0, device: torch.device = CPU, tiny: bool = False, flow_map_layers: int = 0
) -> TransDiffPipeline:
    """Our pipeline around `random_components`; with `flow_map_layers` a few-step student under its own scheduler."""
    encoder, transformer = random_components(model, seed, device, flow_map_layers)
    scheduler: SchedulerMixin = FlowMapScheduler()
    guidance_scale = 1.0  # a student has it built in
    if not flow_map_layers:
        guidance_scale = model.guidance_scale
        scales = {"drift_scale": model.drift_scale, "diffusion_scale": model.diffusion_scale}
        scheduler = FlowMatchEulerMaruyamaScheduler(**scales)
    with device:
        vae = vae_of_published_size(tiny)
    return TransDiffPipeline(encoder, transformer, vae, scheduler, guidance_scale=guidance_scale)


def load_peers(setting: Setting, checkout: Path | None, with_dit: bool, with_float32: bool = False) -> list[Peer]:
    """Our pipeline first, then the others asked for; the released code and ours with the same weights."""
    peers: list[Peer] = []
    if checkout is None:
        start = time.perf_counter()
        pipeline = random_pipeline(setting.model, device=setting.device, tiny=setting.tiny)
        exact = copy.deepcopy(pipeline) if with_float32 and setting.dtype != torch.float32 else None
        ours = OurPipeline(setting, pipeline.to(setting.dtype))
        ours.load_seconds = time.perf_counter() - start
        peers.append(ours)
        if exact is not None:
            peers.append(OurFloat32(replace(setting, dtype=torch.float32), exact))
    else:
        peers.extend(_same_weights(setting, checkout))
    if with_dit:
        peers.append(DiT(setting))
    return peers


def _same_weights(setting: Setting, checkout: Path) -> tuple[Peer, Peer]:
    """Random weights written in the released layout; the released code reads them, and our converter."""
    with tempfile.TemporaryDirectory(prefix="transdiff-benchmark-") as folder:
        path = Path(folder, "checkpoint-last.pth")
        torch.manual_seed(0)
        released = ReleasedModel(checkout, setting.model, setting.device, setting.dtype)
        released.randomize(seed=0)
        released.save(path)

        theirs = ReleasedCode(setting, released)
        start = time.perf_counter()
        released.load(path)
        theirs.load_seconds = time.perf_counter() - start

        vae = vae_of_published_size(setting.tiny).to(setting.dtype)
        start = time.perf_counter()
        model = setting.model
        pipeline = convert_original_checkpoint(
            path, vae, model.size.num_attention_heads, preset=model.folder, dtype=setting.dtype
        )
        load_seconds = time.perf_counter() - start
    ours = OurPipeline(setting, pipeline)
    ours.load_seconds = load_seconds
    return ours, theirs
