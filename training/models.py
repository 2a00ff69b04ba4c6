"""The networks of a run: built from sizes or inherited, frozen where the configuration says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)

from .config import ConfigError, ModelConfig, OptimizerConfig, SamplingConfig
from .inherit import inherit, table
from .latent_cache import LatentCache
from .loss import prefix_losses


class TrainingModel(nn.Module):
    """Encoder and decoder as one module whose forward pass is the loss, as DDP and FSDP want it."""

    def __init__(self, condition_encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel) -> None:
        super().__init__()
        self.condition_encoder = condition_encoder
        self.transformer = transformer

    def forward(self, latents: Tensor, labels: Tensor, timesteps: Tensor, noise: Tensor) -> Tensor:
        """The prefix losses `(N,)` of a batch; see `loss.prefix_losses`."""
        return prefix_losses(self.condition_encoder, self.transformer, latents, labels, timesteps, noise)


def preset_sizes(name: str) -> dict[str, int]:
    """The sizes of a published model, under the names of `ModelConfig`."""
    from transdiff_pipelines.presets import SIZES

    if name not in SIZES:
        raise ConfigError(f"model.preset is {name!r}; valid presets: {', '.join(SIZES)}")
    size, num_class_tokens = SIZES[name], 64
    return {
        "encoder_layers": size.encoder_layers,
        "decoder_layers": size.decoder_layers,
        "num_attention_heads": size.num_attention_heads,
        "attention_head_dim": size.attention_head_dim,
        "num_class_tokens": num_class_tokens,
    }


def new_model(
    sizes: dict[str, int], model: ModelConfig, num_classes: int, latent_shape: tuple[int, int, int]
) -> TrainingModel:
    """A freshly initialised model for latents of `latent_shape` (C, s, s)."""
    channels, side, _ = latent_shape
    if side % model.patch_size:
        raise ConfigError(f"model.patch_size {model.patch_size} does not divide the latent side {side}")
    shared = {
        "sample_size": side,
        "in_channels": channels,
        "num_attention_heads": sizes["num_attention_heads"],
        "attention_head_dim": sizes["attention_head_dim"],
        "dropout": model.dropout,
    }
    encoder = ARConditionEncoder(
        num_classes=num_classes,
        patch_size=model.patch_size,
        num_class_tokens=sizes["num_class_tokens"],
        num_layers=sizes["encoder_layers"],
        **shared,
    )
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    transformer = TransDiffTransformer2DModel(num_layers=sizes["decoder_layers"], cross_attention_dim=width, **shared)
    return TrainingModel(encoder, transformer)


def sizes_of(encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel) -> dict[str, int]:
    """The sizes of existing networks, under the names of `ModelConfig`."""
    return {
        "encoder_layers": encoder.config.num_layers,
        "decoder_layers": transformer.config.num_layers,
        "num_attention_heads": encoder.config.num_attention_heads,
        "attention_head_dim": encoder.config.attention_head_dim,
        "num_class_tokens": encoder.config.num_class_tokens,
    }


def build_model(model: ModelConfig, cache: LatentCache, seed: int) -> tuple[TrainingModel, list[str]]:
    """The model of a run and what a user should know about it, one line each.

    Raises:
        ConfigError: if sizes disagree with the pipeline to start from.
        ValueError: if weights cannot be inherited.
    """
    torch.manual_seed(seed)
    if model.start_from is None:
        sizes = (
            preset_sizes(model.preset) if model.preset else {k: v for k, v in model.sizes().items() if v is not None}
        )
        built, notes = new_model(sizes, model, cache.num_classes, cache.latent_shape), ["initialised afresh"]
    else:
        built, notes = inherit_model(model, cache)
    return built, notes + freeze(built, model)


def inherit_model(model: ModelConfig, cache: LatentCache) -> tuple[TrainingModel, list[str]]:
    """A model for `model` and the data's classes that starts from the pipeline folder `model.start_from`."""
    folder = Path(str(model.start_from))
    if not (folder / "model_index.json").is_file():
        raise ConfigError(f"model.start_from {folder} is not a pipeline folder (it has no model_index.json)")
    old_encoder = ARConditionEncoder.from_pretrained(folder, subfolder="condition_encoder")
    old_transformer = TransDiffTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    sizes = sizes_of(old_encoder, old_transformer)
    differing = [f"{k} {v} (there {sizes[k]})" for k, v in model.sizes().items() if v is not None and v != sizes[k]]
    if differing:
        raise ConfigError(
            f"model sizes differ from {folder}: {', '.join(differing)}; leave them unset to take its sizes"
        )
    built = new_model(sizes, model, cache.num_classes, cache.latent_shape)
    notes = [f"started from {folder}"]
    for part, old in (("condition_encoder", old_encoder), ("transformer", old_transformer)):
        notes.append(f"{part}\n{table(inherit(getattr(built, part), old.state_dict()))}")
    return built, notes


def freeze(built: TrainingModel, model: ModelConfig) -> list[str]:
    """Freeze what the configuration names, and what nothing reads; dropout stays on. Returns a line for each."""
    notes = []
    for part in model.frozen:
        getattr(built, part).requires_grad_(False)
        notes.append(f"frozen: {part} (its dropout and label dropout stay on)")
    if model.patch_size == 1 and "condition_encoder" not in model.frozen:
        built.condition_encoder.reference_projection.requires_grad_(False)
        notes.append("frozen: condition_encoder.reference_projection (nothing reads it in a 1-step model)")
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in built.parameters())
    notes.append(f"parameters: {trained:,} of {total:,} trained")
    return notes


def parameter_groups(built: TrainingModel, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: no weight decay on 1-D tensors, nor on anything in the diffusion decoder."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in built.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.startswith("transformer.")
            (decayed if decays else plain).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(built: TrainingModel, optimizer: OptimizerConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameter_groups(built, optimizer.weight_decay),
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
    )


def build_pipeline(
    built: TrainingModel, vae: AutoencoderKL, sampling: SamplingConfig, classes: list[str]
) -> TransDiffPipeline:
    """The inference pipeline around the networks of a run."""
    scheduler = FlowMatchEulerMaruyamaScheduler(
        drift_scale=sampling.drift_scale, diffusion_scale=sampling.diffusion_scale
    )
    return TransDiffPipeline(
        condition_encoder=built.condition_encoder,
        transformer=built.transformer,
        vae=vae,
        scheduler=scheduler,
        id2label=dict(enumerate(classes)),
        guidance_scale=sampling.guidance_scale,
    )
