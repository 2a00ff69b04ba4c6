"""Released TransDiff checkpoints as this package's components.

A key table says where every released tensor goes; the shapes decide the configuration (the command line recorded in
the file may be wrong, so it is never read).
"""

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL

from ..data import imagenet_id2label
from ..models.ar_condition_encoder import ARConditionEncoder
from ..models.transformer_transdiff import TransDiffTransformer2DModel
from ..presets import PUBLISHED, PublishedModel, published_model, size_of_width
from ..schedulers.scheduling_flow_match_euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .checkpoint_file import read_original_weights
from .key_table import KeyRow, check_names, convert_weights, count_blocks, dimension, module_rows
from .original_vae import is_vae, load_original_vae


Weights = Mapping[str, torch.Tensor]

ENCODER, DECODER = "condition_encoder.", "transformer."

# For the encoder and the decoder: single tensors, then modules with a weight and a bias, then the modules of a block.
# A module with three targets is fused: its tensors are cut into queries, keys and values.
ENCODER_TENSORS = {
    "mask_token": "mask_token",
    "encoder_pos_embed_learned": "position_embedding",
    "diffusion_pos_embed_learned": "condition_position_embedding",
}
ENCODER_MODULES = {"z_proj": "reference_projection", "z_proj_ln": "input_norm", "encoder_norm": "norm_out"}
ENCODER_BLOCK = {
    "norm1": ("norm1",),
    "attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "attn.proj": ("attn.to_out.0",),
    "norm2": ("norm2",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}
DECODER_TENSORS = {
    "diffusion_pos_embed_learned": "position_embedding",
    "final_layer.scale_shift_table": "scale_shift_table",
}
DECODER_MODULES = {
    "input_proj": "proj_in",
    "cond_embed": "condition_projection",
    "time_embed.time_embedder.linear_1": "time_embedding.linear_1",
    "time_embed.time_embedder.linear_2": "time_embedding.linear_2",
    "time_embed.time_proj": "time_modulation",
    "final_layer.linear": "proj_out",
}
DECODER_BLOCK = {
    "norm1": ("norm1",),
    "attn1.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    "attn1.proj": ("attn1.to_out.0",),
    "norm2": ("norm2",),
    "attn2.wq": ("attn2.to_q",),
    "attn2.wk": ("attn2.to_k",),
    "attn2.wv": ("attn2.to_v",),
    "attn2.proj": ("attn2.to_out.0",),
    "norm3": ("norm3",),
    "mlp.fc1": ("ff.net.0.proj",),
    "mlp.fc2": ("ff.net.2",),
}


def load_original_components(
    checkpoint: str | os.PathLike[str],
    vae: str | os.PathLike[str] | AutoencoderKL,
    num_attention_heads: int | None = None,
    preset: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """The arguments of `TransDiffPipeline`, from released files; see `convert_original_checkpoint` for these here."""
    weights = read_original_weights(checkpoint)
    if is_vae(weights):
        raise ValueError(f"{checkpoint} is a VAE, not a TransDiff checkpoint; are the two arguments swapped?")
    encoder_config, transformer_config = read_configs(weights, num_attention_heads, checkpoint)
    published = match_published(encoder_config, transformer_config, preset)
    encoder, transformer = _load_models(weights, encoder_config, transformer_config, checkpoint, dtype)

    return {
        "condition_encoder": encoder,
        "transformer": transformer,
        "vae": _load_vae(vae, dtype),
        "scheduler": FlowMatchEulerMaruyamaScheduler(**_scheduler_config(published)),
        "id2label": imagenet_id2label() if encoder_config["num_classes"] == 1000 else None,
        "guidance_scale": published.guidance_scale if published else 1.0,
    }


def key_table(num_encoder_layers: int, num_decoder_layers: int) -> list[KeyRow]:
    """Every released tensor and where it goes, component first ("condition_encoder.", "transformer.")."""
    # The null embedding of classifier-free guidance becomes the last class.
    rows = [KeyRow(("class_emb.weight", "fake_latent"), (f"{ENCODER}class_embedding.weight",))]
    rows += _part_rows("", ENCODER, ENCODER_TENSORS, ENCODER_MODULES)
    for number in range(num_encoder_layers):
        rows += _block_rows(f"encoder_blocks.{number}", f"{ENCODER}transformer_blocks.{number}", ENCODER_BLOCK)

    rows += _part_rows("diffdecoder.net.", DECODER, DECODER_TENSORS, DECODER_MODULES)
    for number in range(num_decoder_layers):
        source, target = f"diffdecoder.net.res_blocks.{number}", f"{DECODER}transformer_blocks.{number}"
        rows += _block_rows(source, target, DECODER_BLOCK)
        rows.append(KeyRow((f"{source}.scale_shift_table",), (f"{target}.scale_shift_table",)))
    return rows


def _part_rows(source: str, target: str, tensors: Mapping[str, str], modules: Mapping[str, str]) -> list[KeyRow]:
    rows = [KeyRow((source + name,), (target + renamed,)) for name, renamed in tensors.items()]
    for name, renamed in modules.items():
        rows += module_rows(source + name, target + renamed)
    return rows


def _block_rows(source: str, target: str, block: Mapping[str, tuple[str, ...]]) -> list[KeyRow]:
    rows: list[KeyRow] = []
    for name, renamed in block.items():
        rows += module_rows(f"{source}.{name}", *(f"{target}.{part}" for part in renamed))
    return rows


def read_configs(
    weights: Weights, num_attention_heads: int | None, path: str | os.PathLike[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The encoder's and the decoder's constructor arguments, from the shapes of released weights."""
    layers = count_blocks(weights, "encoder_blocks"), count_blocks(weights, "diffdecoder.net.res_blocks")
    check_names(weights, key_table(*layers), path)

    num_classes, width = (dimension(weights, "class_emb.weight", index) for index in (0, 1))
    channels = dimension(weights, "diffdecoder.net.input_proj.weight", 1)
    num_tokens = dimension(weights, "diffusion_pos_embed_learned", 1)
    num_latents = dimension(weights, "diffdecoder.net.diffusion_pos_embed_learned", 1)
    patch_channels = dimension(weights, "z_proj.weight", 1)
    heads = _num_heads(width, num_attention_heads, path)
    shared = {
        "in_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
    }
    encoder = shared | {
        "num_classes": num_classes,
        "sample_size": _square_root(num_tokens, "AR tokens", path),
        "patch_size": _square_root(patch_channels / channels, "latents in an AR patch", path),
        "num_class_tokens": dimension(weights, "encoder_pos_embed_learned", 1) - num_tokens,
        "num_layers": layers[0],
        "mlp_ratio": dimension(weights, "encoder_blocks.0.mlp.fc1.weight", 0) / width,
    }
    transformer = shared | {
        "sample_size": _square_root(num_latents, "latent positions", path),
        "patch_size": 1,
        "num_layers": layers[1],
        "cross_attention_dim": width,
        "mlp_ratio": dimension(weights, "diffdecoder.net.res_blocks.0.mlp.fc1.weight", 0) / width,
    }
    return encoder, transformer


def _square_root(value: float, noun: str, path: str | os.PathLike[str]) -> int:
    root = math.isqrt(int(value))
    if root < 1 or root**2 != value:
        raise ValueError(f"{path} has shapes that make {value:g} {noun}, which is no square number")
    return root


def _num_heads(width: int, num_attention_heads: int | None, path: str | os.PathLike[str]) -> int:
    size = size_of_width(width)
    if num_attention_heads is None:
        if size is None:
            raise ValueError(
                f"{path} has width {width}, which is no published size (768, 1024, 1280), and the shapes do not tell "
                "the number of attention heads; pass num_attention_heads"
            )
        return size.num_attention_heads
    if num_attention_heads < 1 or width % num_attention_heads:
        raise ValueError(f"num_attention_heads {num_attention_heads} does not divide the width {width} of {path}")
    return num_attention_heads


def match_published(
    encoder_config: Mapping[str, Any], transformer_config: Mapping[str, Any], preset: str | None = None
) -> PublishedModel | None:
    """The published model with these shapes, or the one that `preset` names; None where there is neither.

    A preset lends its sampling settings to other models of its kind. It contradicts the shapes when the sequence
    length or the resolution differ, or when the width is another published size's.
    """
    if preset is None:
        for published in PUBLISHED.values():
            expected = published.encoder_config(), published.transformer_config()
            if expected[0].items() <= encoder_config.items() and expected[1].items() <= transformer_config.items():
                return published
        return None
    published = published_model(preset)
    width = transformer_config["cross_attention_dim"]
    contradictions = [
        f"{noun} is {found}, {preset} has {expected}"
        for noun, found, expected in (
            ("images in a sequence", encoder_config["patch_size"] ** 2, published.num_images),
            ("latent size", transformer_config["sample_size"], published.latent_size),
            ("width", width if size_of_width(width) else published.size.width, published.size.width),
        )
        if found != expected
    ]
    if contradictions:
        raise ValueError(f"preset {preset!r} contradicts the checkpoint: {'; '.join(contradictions)}")
    return published


def _load_models(
    weights: Weights,
    encoder_config: Mapping[str, Any],
    transformer_config: Mapping[str, Any],
    path: str | os.PathLike[str],
    dtype: torch.dtype,
) -> tuple[ARConditionEncoder, TransDiffTransformer2DModel]:
    with init_empty_weights():
        encoder = ARConditionEncoder(**encoder_config)
        transformer = TransDiffTransformer2DModel(**transformer_config)
    models = {ENCODER: encoder, DECODER: transformer}
    shapes = {
        prefix + name: tuple(tensor.shape)
        for prefix, model in models.items()
        for name, tensor in model.state_dict().items()
    }
    rows = key_table(encoder_config["num_layers"], transformer_config["num_layers"])
    converted = convert_weights(weights, rows, shapes, path, dtype)
    for prefix, model in models.items():
        state = {name.removeprefix(prefix): tensor for name, tensor in converted.items() if name.startswith(prefix)}
        model.load_state_dict(state, assign=True)
        model.eval()
    return encoder, transformer


def _load_vae(vae: str | os.PathLike[str] | AutoencoderKL, dtype: torch.dtype) -> AutoencoderKL:
    if isinstance(vae, AutoencoderKL):
        return vae
    if os.path.isdir(vae):
        return AutoencoderKL.from_pretrained(vae, dtype=dtype, local_files_only=True)
    return load_original_vae(vae, dtype)


def _scheduler_config(published: PublishedModel | None) -> dict[str, float]:
    if published is None:
        return {}
    return {"drift_scale": published.drift_scale, "diffusion_scale": published.diffusion_scale}
