"""Feature extractors: pictures to the numbers that metrics are taken on.

| name | features | needs |
|---|---|---|
| torch-fidelity | Inception-v3 pool, logits, and the spatial ones of sFID | `pip install torch-fidelity torchvision` |
| torchscript | Inception-v3 pool and logits | `inception-2015-12-05.pt` of the StyleGAN authors, as weights |
| pixels | the picture as 8x8 grey values in 0..16 | nothing; for digits and other small pictures |
| module:function | what your function returns: an `Extractor`, given weights and device | your module |

Shapes: B images, D pooled features, K classes, E spatial features.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.nn import functional as F


SPATIAL_CHANNELS = 7


class ExtractorError(RuntimeError):
    """A feature extractor that cannot be used; the message says what is missing and how to get it."""


@dataclass(frozen=True)
class Features:
    """Features of B images: pooled `(B, D)`; logits `(B, K)` and spatial `(B, E)` where the extractor has them."""

    pool: torch.Tensor
    logits: torch.Tensor | None = None
    spatial: torch.Tensor | None = None


class Extractor(Protocol):
    """Pictures `(B, 3, H, W)` uint8 to `Features`."""

    def __call__(self, images: torch.Tensor) -> Features: ...


Factory = Callable[[Path | None, torch.device], Extractor]

EXTRACTORS: dict[str, Factory] = {}


def register_extractor(name: str) -> Callable[[Factory], Factory]:
    """Make a factory known under a name: a function of the weights' path (or None) and the device."""

    def register(factory: Factory) -> Factory:
        EXTRACTORS[name] = factory
        return factory

    return register


def load_extractor(name: str, weights: Path | None, device: torch.device) -> Extractor:
    """The extractor of that name, or the one that `module:function` makes.

    Raises:
        ExtractorError: there is none, or it lacks something; the message has the remedy.
    """
    if weights is not None and not weights.is_file():
        raise ExtractorError(f"there are no weights at {weights}")
    factory = _factory(name)
    try:
        return factory(weights, device)
    except ExtractorError:
        raise
    except Exception as error:  # weights of every kind, and functions of every user
        of = "" if weights is None else f" with the weights {weights}"
        raise ExtractorError(f"extractor {name!r} cannot be made{of}: {type(error).__name__}: {error}") from error


def try_extractor(name: str, extractor: Extractor, side: int) -> Features:
    """Features of two black pictures of `side` pixels: what would fail after the sampling fails before it.

    Raises:
        ExtractorError: the extractor fails, or does not return `Features` of two pictures.
    """
    try:
        features = extractor(torch.zeros(2, 3, side, side, dtype=torch.uint8))
        shapes = [part.shape for part in (features.pool, features.logits, features.spatial) if part is not None]
    except Exception as error:
        raise ExtractorError(
            f"extractor {name!r} fails on pictures of {side} pixels: {type(error).__name__}: {error}"
        ) from error
    if any(len(shape) != 2 or shape[0] != 2 for shape in shapes):
        made = ", ".join(str(tuple(shape)) for shape in shapes)
        raise ExtractorError(f"extractor {name!r} made {made} of two pictures; expected (2, number of features) each")
    return features


def _factory(name: str) -> Factory:
    if name in EXTRACTORS:
        return EXTRACTORS[name]
    module, _, function = name.partition(":")
    if not function:
        raise ExtractorError(
            f"extractor {name!r} is unknown; choose one of {', '.join(EXTRACTORS)}, or module:function"
        )
    try:
        factory: Factory = getattr(importlib.import_module(module), function)
    except Exception as error:  # the module is the user's
        raise ExtractorError(f"extractor {name!r} cannot be imported: {type(error).__name__}: {error}") from error
    return factory


@register_extractor("pixels")
def pixels(weights: Path | None, device: torch.device) -> Extractor:
    """64 grey values: the form in which the digits data were published."""

    def extract(images: torch.Tensor) -> Features:
        grey = images.to(device).double().mean(dim=1, keepdim=True) / 255 * 16
        return Features(pool=F.adaptive_avg_pool2d(grey, 8).flatten(1).float())

    return extract


@register_extractor("torchscript")
class TorchScriptInception:
    """Inception-v3 with TensorFlow's weights and resize, as TorchScript (`inception-2015-12-05.pt`)."""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        if weights is None:
            raise ExtractorError(
                "the torchscript extractor needs weights: the file inception-2015-12-05.pt that the StyleGAN authors "
                "publish; pass its path"
            )
        try:
            self.network = torch.jit.load(str(weights), map_location=device).eval()
        except RuntimeError as error:
            raise ExtractorError(f"{weights} is no TorchScript file: {str(error).splitlines()[0]}") from error
        self.device = device

    def __call__(self, images: torch.Tensor) -> Features:
        images = images.to(self.device)
        # Without the bias of the last layer, as in the original Inception Score.
        probabilities = self.network(images, no_output_bias=True)
        return Features(
            pool=self.network(images, return_features=True),
            logits=probabilities.double().clamp(min=torch.finfo(torch.float64).tiny).log(),
        )


@register_extractor("torch-fidelity")
class TorchFidelityInception:
    """torch-fidelity's Inception-v3, which also has the features of sFID: mixed_6/conv, its first 7 channels."""

    def __init__(self, weights: Path | None, device: torch.device) -> None:
        network_class = _import_torch_fidelity()
        if weights is not None:
            # torch-fidelity unpickles the file without restriction: look first whether it holds tensors alone.
            torch.load(weights, map_location="cpu", weights_only=True)
        try:
            network = network_class(
                "inception-v3-compat",
                ["2048", "logits_unbiased"],
                feature_extractor_weights_path=None if weights is None else str(weights),
                verbose=False,
            )
        except OSError as error:
            raise ExtractorError(
                f"the Inception weights could not be downloaded ({error}); get them where there is a network and pass "
                "their path"
            ) from error
        self.network, self.device = network.to(device), device
        self._spatial: torch.Tensor | None = None
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        # Channels last, the order of the ADM reference statistics.
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)

    def __call__(self, images: torch.Tensor) -> Features:
        pool, logits = self.network(images.to(self.device))
        return Features(pool=pool, logits=logits, spatial=self._spatial)


def _import_torch_fidelity() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except (ImportError, RuntimeError) as error:  # a torchvision of another build fails with a RuntimeError
        raise ExtractorError(
            f"torch-fidelity cannot be imported ({error}); it needs torchvision in the build of the installed torch: "
            "pip install torch-fidelity torchvision. Or use the torchscript extractor, which needs neither, or one of "
            "your own (module:function)"
        ) from error
    return FeatureExtractorInceptionV3
