"""The released VAE, in latent-diffusion naming, as diffusers' `AutoencoderKL`."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL

from ..presets import VAE_SCALING_FACTOR
from .checkpoint_file import read_original_weights
from .key_table import KeyRow, check_names, convert_weights, count_blocks, dimension, module_rows


ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def is_vae(weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether released weights look like the VAE's."""
    return "encoder.conv_in.weight" in weights or "decoder.conv_in.weight" in weights


def load_original_vae(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """Build the `AutoencoderKL` of a released VAE file; the shapes of its weights decide the configuration.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is unreadable, another model's, or its names or shapes do not fit together.
    """
    weights = read_original_weights(path)
    if "class_emb.weight" in weights:
        raise ValueError(f"{path} is a TransDiff checkpoint, not a VAE; are the two arguments swapped?")
    rows = _rows(weights)
    check_names(weights, rows, path)
    with init_empty_weights():
        vae = AutoencoderKL(**_config(weights))
    shapes = {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}
    vae.load_state_dict(convert_weights(weights, rows, shapes, path, dtype), assign=True)
    return vae.eval()


def _config(weights: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    levels = range(count_blocks(weights, "encoder.down"))
    # The levels of the decoder are counted from the full resolution, decoder.up.0, which runs last.
    down_attention = [f"encoder.down.{level}.attn.0.q.weight" in weights for level in levels]
    up_attention = [f"decoder.up.{level}.attn.0.q.weight" in weights for level in reversed(levels)]
    return {
        "in_channels": dimension(weights, "encoder.conv_in.weight", 1),
        "out_channels": dimension(weights, "decoder.conv_out.weight", 0),
        "down_block_types": ["AttnDownEncoderBlock2D" if attn else "DownEncoderBlock2D" for attn in down_attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if attn else "UpDecoderBlock2D" for attn in up_attention],
        "block_out_channels": [
            dimension(weights, f"encoder.down.{level}.block.0.conv1.weight", 0) for level in levels
        ],
        "layers_per_block": count_blocks(weights, "encoder.down.0.block"),
        "latent_channels": dimension(weights, "post_quant_conv.weight", 0),
        "sample_size": 256,
        "scaling_factor": VAE_SCALING_FACTOR,
    }


def _rows(weights: Mapping[str, torch.Tensor]) -> list[KeyRow]:
    rows = [*module_rows("quant_conv", "quant_conv"), *module_rows("post_quant_conv", "post_quant_conv")]
    for half in ("encoder", "decoder"):
        rows += module_rows(f"{half}.conv_in", f"{half}.conv_in")
        rows += module_rows(f"{half}.norm_out", f"{half}.conv_norm_out")
        rows += module_rows(f"{half}.conv_out", f"{half}.conv_out")
        rows += _attention_rows(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0")
        for number in (0, 1):
            rows += _residual_rows(weights, f"{half}.mid.block_{number + 1}", f"{half}.mid_block.resnets.{number}")
    levels = count_blocks(weights, "encoder.down")
    for level in range(levels):
        rows += _level_rows(weights, f"encoder.down.{level}", f"encoder.down_blocks.{level}")
        rows += _level_rows(weights, f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}")
        if level < levels - 1:
            rows += module_rows(
                f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
            )
        if level > 0:
            rows += module_rows(
                f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{levels - 1 - level}.upsamplers.0.conv"
            )
    return rows


def _level_rows(weights: Mapping[str, torch.Tensor], source: str, target: str) -> list[KeyRow]:
    rows: list[KeyRow] = []
    for number in range(count_blocks(weights, f"{source}.block")):
        rows += _residual_rows(weights, f"{source}.block.{number}", f"{target}.resnets.{number}")
        if f"{source}.attn.0.q.weight" in weights:
            rows += _attention_rows(f"{source}.attn.{number}", f"{target}.attentions.{number}")
    return rows


def _residual_rows(weights: Mapping[str, torch.Tensor], source: str, target: str) -> list[KeyRow]:
    rows: list[KeyRow] = []
    for name in ("norm1", "conv1", "norm2", "conv2"):
        rows += module_rows(f"{source}.{name}", f"{target}.{name}")
    if f"{source}.nin_shortcut.weight" in weights:
        rows += module_rows(f"{source}.nin_shortcut", f"{target}.conv_shortcut")
    return rows


def _attention_rows(source: str, target: str) -> list[KeyRow]:
    rows = module_rows(f"{source}.norm", f"{target}.group_norm")
    for name, renamed in ATTENTION.items():
        rows += module_rows(f"{source}.{name}", f"{target}.{renamed}", pointwise=True)
    return rows
