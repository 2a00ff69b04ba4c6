"""TransDiff (arXiv 2506.09482) as a diffusers package: label in, image out.

Importing this package registers its classes with diffusers, so that `DiffusionPipeline.from_pretrained` and
`AutoModel` load TransDiff checkpoints, from folders and from the Hub.
"""

from pathlib import Path

from . import upstream_messages as upstream_messages  # before diffusers, whose import already writes some of them


# isort: split
# The base classes are exported for diffusers' loader, which looks for them here (see registration.py).
from diffusers import ModelMixin, SchedulerMixin

from .models import ARConditionEncoder, TransDiffTransformer2DModel
from .models.ar_condition_encoder import ARTransformerBlock
from .models.attention import TransDiffAttnProcessor
from .models.transformer_transdiff import TransDiffTransformerBlock
from .pipelines import (
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
    TransDiffPipeline,
    blend_conditions,
    convert_original_checkpoint,
    pad_for_outpainting,
)
from .registration import register_hook_targets, register_with_diffusers
from .schedulers import FlowMapScheduler, FlowMatchEulerMaruyamaScheduler, FlowMatchSDEMultistepScheduler


__version__ = "0.1.0"

DIGITS = Path(__file__).parent / "checkpoints" / "digits"
"""Folder of a bundled checkpoint: an MRAR model of handwritten digits."""

DIGITS_FLOW_MAP = DIGITS.with_name("digits_flow_map")
"""Folder of its flow map, for digits in one to four calls; to be loaded with `TransDiffPipeline.from_pretrained`."""

EMOJI = DIGITS.with_name("emoji")
"""Folder of an MRAR model of emoji: colour pictures of 64 pixels, of 1,051 classes by name."""

register_with_diffusers(
    ARConditionEncoder,
    TransDiffTransformer2DModel,
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchSDEMultistepScheduler,
    TransDiffPipeline,
    TransDiffImg2ImgPipeline,
    TransDiffInpaintPipeline,
)
register_hook_targets([ARTransformerBlock, TransDiffTransformerBlock], TransDiffAttnProcessor)

__all__ = [
    "DIGITS",
    "DIGITS_FLOW_MAP",
    "EMOJI",
    "ARConditionEncoder",
    "FlowMapScheduler",
    "FlowMatchEulerMaruyamaScheduler",
    "FlowMatchSDEMultistepScheduler",
    "ModelMixin",
    "SchedulerMixin",
    "TransDiffImg2ImgPipeline",
    "TransDiffInpaintPipeline",
    "TransDiffPipeline",
    "TransDiffTransformer2DModel",
    "blend_conditions",
    "convert_original_checkpoint",
    "pad_for_outpainting",
]
