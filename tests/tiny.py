"""Tiny real components for tests: random weights, every part of the architecture present."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)


NUM_CLASSES = 5
CHANNELS = 4
SIDE = 4
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}


def randomize(model: nn.Module, seed: int = 0, std: float = 0.2) -> nn.Module:
    """Give every parameter a share in the output: as initialised, the last linear is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def tiny_encoder(patch_size: int = 2, sample_size: int = SIDE, **config) -> ARConditionEncoder:
    torch.manual_seed(0)
    config = {"num_class_tokens": 3, "num_layers": 2, **HEADS, **config}
    return randomize(
        ARConditionEncoder(
            num_classes=NUM_CLASSES, sample_size=sample_size, in_channels=CHANNELS, patch_size=patch_size, **config
        )
    )


def tiny_transformer(sample_size: int = SIDE, in_channels: int = CHANNELS, **config) -> TransDiffTransformer2DModel:
    torch.manual_seed(0)
    config = {"num_layers": 2, "cross_attention_dim": 16, **HEADS, **config}
    return randomize(TransDiffTransformer2DModel(sample_size=sample_size, in_channels=in_channels, **config))


def tiny_vae(latent_channels: int = CHANNELS) -> AutoencoderKL:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=latent_channels,
        layers_per_block=1,
        scaling_factor=0.5,
    )
    return vae.eval()


def tiny_pipeline(patch_size: int = 2, **components) -> TransDiffPipeline:
    parts = {
        "condition_encoder": tiny_encoder(patch_size),
        "transformer": tiny_transformer(),
        "vae": tiny_vae(),
        "scheduler": FlowMatchEulerMaruyamaScheduler(drift_scale=0.9, diffusion_scale=0.95),
        "id2label": {0: "tench, Tinca tinca", 1: "goldfish", 2: "crane, bird", 3: "crane, machine", 4: "zebra"},
        "guidance_scale": 1.3,
        **components,
    }
    pipe = TransDiffPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
