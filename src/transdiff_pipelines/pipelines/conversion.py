"""The released checkpoints as a pipeline; `loaders/` reads the files."""

import os

import torch
from diffusers import AutoencoderKL

from ..loaders.original_checkpoint import load_original_components
from .pipeline_transdiff import TransDiffPipeline


def convert_original_checkpoint(
    checkpoint: str | os.PathLike[str],
    vae_checkpoint: str | os.PathLike[str] | AutoencoderKL,
    num_attention_heads: int | None = None,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TransDiffPipeline:
    """Build a pipeline from the authors' `.pth` files; `pipeline.save_pretrained(folder)` then stores it.

    The exponential-moving-average weights are taken. A checkpoint with the shapes of a published model gets the
    guidance, drift and diffusion scales published for it, any other one gets 1.0 for all three.

    Args:
        checkpoint: a released TransDiff `checkpoint-last.pth`.
        vae_checkpoint: the released VAE's `checkpoint-last.pth`, a folder with an `AutoencoderKL`, or the model,
            which is taken as it is.
        num_attention_heads: heads in both parts, for widths other than those of the published sizes: heads leave no
            trace in the shapes.
        preset: a published model (its folder in the authors' repository, e.g. "transdiff_l_mrar") whose sampling
            settings to use, for a checkpoint with other shapes, e.g. one fine-tuned on other classes.
        dtype: the weights' type in the pipeline.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is unreadable or another model's, its weights' names or shapes do not fit, the head count
            is unknown or impossible, or `preset` is unknown or contradicts the shapes.
    """
    return TransDiffPipeline(
        **load_original_components(checkpoint, vae_checkpoint, num_attention_heads, preset, dtype)
    )
