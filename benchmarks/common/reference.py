"""The authors' released code as a peer, adapted while it runs: nothing of it is in this repository.

The released code assumes a GPU and bfloat16 at places of its own choosing. What is put right here, from outside:
`.cuda()` goes to the device of the run; the names that timm would provide; the two hard-coded bfloat16 (the time
modulation's input, the attention mask), which are float32 in a float32 run; noise and timesteps that can be recorded.
"""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import nn

from transdiff_pipelines.latents import pack_latents
from transdiff_pipelines.presets import PublishedModel


class Mlp(nn.Module):
    """timm's MLP as far as the released models use it, with its parameter names."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: type[nn.Module], drop: float):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(hidden_states)))))


class TorchWith:
    """The torch module with some of its names replaced, as one module of the released code shall see it."""

    def __init__(self, **replaced: Any):
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _timm_stand_in() -> dict[str, ModuleType]:
    """What to put into `sys.modules` where timm is not installed: the three names the released code imports."""
    try:
        importlib.import_module("timm.models.vision_transformer")
        return {}
    except ImportError:
        names = ("timm", "timm.models", "timm.models.vision_transformer")
        modules = {name: ModuleType(name) for name in names}
        # The released code builds LayerScale and DropPath only for settings that no released model has.
        vars(modules[names[-1]]).update(Mlp=Mlp, LayerScale=None, DropPath=None)
        return modules


def import_released(checkout: Path) -> dict[str, ModuleType]:
    """The released modules that sampling needs, by their last name.

    Raises:
        FileNotFoundError: `checkout` is not a checkout of the released code.
    """
    if not (checkout / "models" / "transdiff_mrar.py").is_file():
        raise FileNotFoundError(f"{checkout} has no models/transdiff_mrar.py; pass a checkout of the released code")
    names = ("transdiff", "transdiff_mrar", "diffdecoder", "crossattention", "samplers")
    stand_in = _timm_stand_in()
    sys.modules.update(stand_in)
    try:
        with (
            mock.patch.object(sys, "path", [str(checkout), *sys.path]),
            mock.patch.object(sys, "dont_write_bytecode", True),  # leave the checkout as it is
        ):
            return {name: importlib.import_module(f"models.{name}") for name in names}
    finally:
        for name in stand_in:
            del sys.modules[name]


def constructor_arguments(model: PublishedModel) -> dict[str, Any]:
    """What the released builder of a size passes on; written out, so that a model may have fewer blocks."""
    size = model.size
    sizes = {
        "embed_dim": size.width,
        "num_heads": size.num_attention_heads,
        "depth": size.decoder_layers,
    }
    if size.encoder_layers != 2 * size.decoder_layers:
        raise ValueError(f"{size.encoder_layers} encoder blocks; the released code has two for each decoder block")
    return {
        **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in sizes.items()},
        "norm_layer": partial(nn.LayerNorm, eps=1e-6),
        "img_size": model.resolution,
        "patch_size": model.patch_size,
        "class_num": model.num_classes,
    }


class ReleasedModel:
    """A released model of a published size with random weights, on a device, in a precision.

    bfloat16 is what the authors do: float32 weights under autocast.

    Args:
        checkout: folder of the released code.
        model: which of the published models.
        device: where to run.
        dtype: float32 or bfloat16.
    """

    def __init__(self, checkout: Path, model: PublishedModel, device: torch.device, dtype: torch.dtype):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"the released code runs in float32 or bfloat16, not in {dtype}")
        self.published, self.device, self.dtype = model, device, dtype
        self._modules = import_released(checkout)
        seen = TorchWith(bfloat16=dtype)
        for name in ("diffdecoder", "transdiff_mrar"):
            vars(self._modules[name])["torch"] = seen
        self._builder = self._modules["transdiff_mrar" if model.patch_size > 1 else "transdiff"]
        with self._adapted():
            self.module: Any = self._builder.Transdiff(**constructor_arguments(model))
        self.module.to(device).eval()

    @property
    def network(self) -> nn.Module:
        """The denoising network, called once a step."""
        return self.module.diffdecoder.net

    @contextmanager
    def _adapted(self) -> Iterator[None]:
        with mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor.to(self.device)):
            yield

    def randomize(self, seed: int) -> None:
        """Give the last linear, zero at first, weights: otherwise no difference further in can be seen."""
        linear: Any = self.network.final_layer.linear  # type: ignore[union-attr]
        generator = torch.Generator().manual_seed(seed)
        linear.weight.data = (0.02 * torch.randn(linear.weight.shape, generator=generator)).to(self.device)

    def save(self, path: Path) -> None:
        """Write a checkpoint in the released layout."""
        torch.save({"model": self.module.state_dict(), "model_ema": self.module.state_dict()}, path)

    def load(self, path: Path) -> None:
        """Read the weights that `save` wrote."""
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        self.module.load_state_dict(content["model_ema"])

    @torch.no_grad()
    def sample(self, labels: list[int], num_steps: int) -> torch.Tensor:
        """Latents `(B, C, s, s)` with the published guidance and scales."""
        published = self.published
        with self._adapted(), torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            return self.module.samples(
                torch.tensor(labels, device=self.device),
                num_sampling_steps=num_steps,
                cfg=float(published.guidance_scale),
                scale_0=published.drift_scale,
                scale_1=published.diffusion_scale,
            )

    def sample_with_noise(
        self, labels: list[int], noise: torch.Tensor, step_noise: list[torch.Tensor]
    ) -> torch.Tensor:
        """`sample` with recorded noise `(B, C, s, s)`: the initial one, and that of every step but an image's last."""
        draws = iter(step_noise)
        num_steps = len(step_noise) // self.published.num_images + 1
        recorded = TorchWith(randn_like=lambda _: pack_latents(next(draws), 1))
        with (
            mock.patch.object(self._modules["samplers"], "torch", recorded),
            mock.patch.object(self._builder, "randn_tensor", return_value=pack_latents(noise, 1)),
        ):
            return self.sample(labels, num_steps)

    def loss(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The released training loss of latents `(B, N, C, s, s)`, N images a group, and labels `(B,)`.

        In training mode the released code drops labels by itself; noise and timesteps it draws in every mode.
        """
        with self._adapted(), torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16):
            return self.module(*latents.unbind(1), labels)

    def loss_with_draws(
        self, latents: torch.Tensor, labels: torch.Tensor, normal: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """`loss` with recorded draws: normal numbers `(N, B * m)` for the timesteps, noise `(N, B * m, C, s, s)`."""
        rows, times = iter(pack_latents(noise.flatten(0, 1), 1)), iter(normal.double().numpy())
        decoder = vars(self._modules["diffdecoder"])
        recorded = TorchWith(bfloat16=self.dtype, randn_like=lambda _: next(rows)[None])
        with mock.patch.dict(decoder, torch=recorded, norm=SimpleNamespace(rvs=lambda **_: next(times))):
            return self.loss(latents, labels)
