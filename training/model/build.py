"""The networks of a run: built from sizes or inherited, frozen where the configuration says so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin
from torch import Tensor, nn

from training.data.batches import TrainingData
from training.data.vae import tensors_digest
from training.settings.config import ConfigError, LoraConfig, ModelConfig, TrainConfig
from transdiff_pipelines import (
    ARConditionEncoder,
    FlowMapScheduler,
    FlowMatchEulerMaruyamaScheduler,
    TransDiffPipeline,
    TransDiffTransformer2DModel,
)
from transdiff_pipelines.files import why_no_pipeline
from transdiff_pipelines.generation import without_loading_bars
from transdiff_pipelines.models.ar_condition_encoder import group_sizes
from transdiff_pipelines.pipelines.checks import guidance_per_image
from transdiff_pipelines.pipelines.class_set import match_classes, resize_class_embedding

from .inherit import DECODER_RULES, ENCODER_RULES, inherit, table
from .lora import add_adapters
from .loss import flow_map_losses, prefix_losses


DEFAULT_SAMPLING = {"guidance_scale": 1.3, "drift_scale": 1.0, "diffusion_scale": 1.0, "num_inference_steps": None}
# A flow map has its teacher's guidance built in.
FLOW_MAP_SAMPLING = {"guidance_scale": 1.0, "num_inference_steps": 4}


class TrainingModel(nn.Module):
    """Encoder and decoder as one module whose forward pass is the loss, as DDP and FSDP want it.

    Attributes:
        classes: names of the encoder's classes.
        class_ids: `(data classes + 1,)` the encoder's class of each class of the data, the null class last; None
            where they are the same.
        origin: digest of the weights of the pipeline that it started from; None if there is none.
        error_scale: that of `loss.flow_map_losses`.
    """

    class_ids: Tensor | None
    origin: str | None = None
    error_scale: float | None = None

    def __init__(
        self, condition_encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel, classes: list[str]
    ) -> None:
        super().__init__()
        self.condition_encoder = condition_encoder
        self.transformer = transformer
        self.classes = classes
        self.register_buffer("class_ids", None, persistent=False)

    def forward(self, latents: Tensor, labels: Tensor, **batch: Tensor) -> Tensor:
        """The losses `(N,)` of a batch: `loss.prefix_losses`, or `loss.flow_map_losses` where it has targets."""
        if self.class_ids is not None:
            labels = self.class_ids[labels]
        losses: Callable[..., Tensor] = prefix_losses
        if "targets" in batch:
            losses = partial(flow_map_losses, error_scale=self.error_scale)
        return losses(self.condition_encoder, self.transformer, latents, labels, **batch)


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
        "decoder_patch_size": 1,
    }


def new_model(
    sizes: dict[str, int],
    model: ModelConfig,
    classes: list[str],
    latent_shape: tuple[int, int, int],
    encoder_side: int | None = None,
) -> TrainingModel:
    """A freshly initialised model for latents of `latent_shape` (C, s, s); the encoder's grid may differ."""
    channels, side, _ = latent_shape
    encoder_side = encoder_side or side
    try:
        group_sizes(encoder_side, model.patch_size, model.scales)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    shared = {
        "in_channels": channels,
        "num_attention_heads": sizes["num_attention_heads"],
        "attention_head_dim": sizes["attention_head_dim"],
        "dropout": model.dropout,
    }
    encoder = ARConditionEncoder(
        num_classes=len(classes),
        sample_size=encoder_side,
        patch_size=model.patch_size,
        scales=model.scales,
        num_class_tokens=sizes["num_class_tokens"],
        num_layers=sizes["encoder_layers"],
        **shared,
    )
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    if model.flow_map_layers > sizes["decoder_layers"]:
        raise ConfigError(
            f"model.flow_map_layers is {model.flow_map_layers}, but the decoder has {sizes['decoder_layers']} blocks"
        )
    decoder_patch = sizes.get("decoder_patch_size", 1)
    if decoder_patch < 1 or side % decoder_patch:
        raise ConfigError(
            f"model.decoder_patch_size is {decoder_patch}, and the latents have a side of {side}: set a divisor of it"
        )
    transformer = TransDiffTransformer2DModel(
        sample_size=side,
        patch_size=decoder_patch,
        num_layers=sizes["decoder_layers"],
        cross_attention_dim=width,
        num_flow_map_layers=model.flow_map_layers,
        **shared,
    )
    return TrainingModel(encoder, transformer, classes)


def sizes_of(encoder: ARConditionEncoder, transformer: TransDiffTransformer2DModel) -> dict[str, int]:
    """The sizes of existing networks, under the names of `ModelConfig`."""
    return {
        "encoder_layers": encoder.config.num_layers,
        "decoder_layers": transformer.config.num_layers,
        "num_attention_heads": encoder.config.num_attention_heads,
        "attention_head_dim": encoder.config.attention_head_dim,
        "num_class_tokens": encoder.config.num_class_tokens,
        "decoder_patch_size": transformer.config.patch_size,
    }


def build_model(config: TrainConfig, data: TrainingData) -> tuple[TrainingModel, list[str]]:
    """The model of a run, and lines about it that a user should read.

    Raises:
        ConfigError: if sizes or classes disagree with the pipeline to start from, or weights cannot be inherited.
    """
    model, lora = config.model, config.lora
    torch.manual_seed(config.seed)
    if model.start_from is None:
        sizes = (
            preset_sizes(model.preset) if model.preset else {k: v for k, v in model.sizes().items() if v is not None}
        )
        built, notes = new_model(sizes, model, data.classes, data.latent_shape), ["initialised afresh"]
    else:
        built, notes = inherit_model(model, lora, data)
    notes += freeze(built, model) if lora.rank is None else add_adapters(built, lora, model.frozen)
    built.error_scale = config.loss.error_scale
    if config.gradient_checkpointing:
        built.condition_encoder.enable_gradient_checkpointing()
        built.transformer.enable_gradient_checkpointing()
    trained = sum(parameter.numel() for parameter in built.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in built.parameters())
    return built, [*notes, f"parameters: {trained:,} of {total:,} trained"]


def starting_folder(model: ModelConfig) -> Path:
    """The pipeline folder `model.start_from`.

    Raises:
        ConfigError: it is none; the message says what it is.
    """
    folder = Path(str(model.start_from))
    if not (folder / "model_index.json").is_file():
        problem = why_no_pipeline(folder) if folder.is_dir() else "is no folder; name that of a pipeline or run"
        raise ConfigError(f"model.start_from {folder} {problem}")
    return folder


def inherit_model(model: ModelConfig, lora: LoraConfig, data: TrainingData) -> tuple[TrainingModel, list[str]]:
    """A model for `model` and the data's classes that starts from the pipeline folder `model.start_from`."""
    folder = starting_folder(model)
    with without_loading_bars():
        old_encoder = ARConditionEncoder.from_pretrained(folder, subfolder="condition_encoder")
        old_transformer = TransDiffTransformer2DModel.from_pretrained(folder, subfolder="transformer")
    origin = "-".join(tensors_digest(network.state_dict()) for network in (old_encoder, old_transformer))
    sizes = sizes_of(old_encoder, old_transformer)
    differing = [f"{k} {v} (there {sizes[k]})" for k, v in model.sizes().items() if v is not None and v != sizes[k]]
    if differing:
        raise ConfigError(
            f"model sizes differ from {folder}: {', '.join(differing)}; leave them unset to take its sizes"
        )
    old_names = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("id2label")
    sources = class_sources(model, old_names, old_encoder.config.num_classes, data.classes)
    if model.flow_map_layers > 0:
        check_taught_model(model, old_encoder, sources, data.classes)
    if lora.rank is None:
        classes, notes = data.classes, [f"started from {folder}", describe_classes(sources, data.classes)]
        resize_class_embedding(old_encoder, sources)
    else:
        check_adapted_sequence(model, old_encoder)
        classes = [(old_names or {}).get(str(i), str(i)) for i in range(old_encoder.config.num_classes)]
        notes = [f"adapting {folder}"]
    built = new_model(sizes, model, classes, data.latent_shape, encoder_side(model, old_encoder, data))
    built.origin = origin
    if lora.rank is not None:
        built.class_ids = adapted_classes(sources, data.classes, len(classes))
    for part, old, rules in (
        ("condition_encoder", old_encoder, ENCODER_RULES),
        ("transformer", old_transformer, DECODER_RULES),
    ):
        try:
            notes.append(f"{part}\n{table(inherit(getattr(built, part), old.state_dict(), rules))}")
        except ValueError as error:
            raise ConfigError(f"{part} of {folder}: {error}") from None
    return built, notes


def encoder_side(model: ModelConfig, old: ARConditionEncoder, data: TrainingData) -> int:
    """The side of the encoder's grid. It stays the old one: a 1-step encoder sees no image, so that the resolution
    does not matter to it.
    """
    side = data.latent_shape[1]
    if model.images_in_sequence > 1 and old.config.sample_size != side:
        raise ConfigError(
            f"model.start_from has an encoder for {old.config.sample_size} x {old.config.sample_size} latents, the "
            f"data's are {side} x {side}: a model of {model.images_in_sequence} images a sequence reads them and "
            "keeps their size. Use data of that size, or a 1-step model (patch_size 1, no scales)"
        )
    return old.config.sample_size


def class_sources(model: ModelConfig, old_names: dict | None, num_old: int, classes: list[str]) -> list[int | None]:
    """For each class of the data, the class of `model.start_from` whose embedding it keeps, or None."""
    new_names = dict(enumerate(classes))
    if model.classes == "new":
        return [None] * len(classes)
    try:
        sources = match_classes(old_names if model.classes == "by_name" else None, new_names, num_old)
    except ValueError as error:
        raise ConfigError(f"model.classes=by_name: {error}") from None
    if len(classes) == num_old and sources == [None] * num_old:
        raise ConfigError(
            f"model.start_from has as many classes as the data, {num_old}, and not one of the same name "
            f"({next(iter((old_names or {}).values()))!r}, {classes[0]!r}): set model.classes=by_id if class i is "
            "class i, or model.classes=new if they are others"
        )
    return sources


def describe_classes(sources: list[int | None], classes: list[str]) -> str:
    new = [name for name, source in zip(classes, sources, strict=True) if source is None]
    names = f": {', '.join(new[:5])}{', ...' if len(new) > 5 else ''}" if new else ""
    return f"classes: {len(classes) - len(new)} of {len(classes)} kept, {len(new)} from the mean of the old{names}"


def check_adapted_sequence(model: ModelConfig, old: ARConditionEncoder) -> None:
    """Raise ConfigError if a LoRA run would make other sequences than its base. They would need new weights, which
    LoRA does not train.
    """
    scales = old.config.scales and list(old.config.scales)
    if (model.patch_size, model.scales) != (old.config.patch_size, scales):
        raise ConfigError(
            f"LoRA adapts the sequences of model.start_from (patch_size {old.config.patch_size}, scales {scales}), "
            f"but model.patch_size is {model.patch_size} and model.scales is {model.scales}: set them alike, or train "
            "without lora.rank"
        )


def check_taught_model(
    model: ModelConfig, old: ARConditionEncoder, sources: list[int | None], classes: list[str]
) -> None:
    """Raise ConfigError if a flow map would make sequences or classes that its teacher has not learned."""
    scales = old.config.scales and list(old.config.scales)
    if (model.patch_size, model.scales) != (old.config.patch_size, scales):
        raise ConfigError(
            f"a flow map makes the sequences of its teacher, model.start_from (patch_size {old.config.patch_size}, "
            f"scales {scales}), but model.patch_size is {model.patch_size} and model.scales is {model.scales}: set "
            "them alike"
        )
    unknown = [name for name, source in zip(classes, sources, strict=True) if source is None]
    if unknown:
        raise ConfigError(
            f"the teacher of a flow map, model.start_from, does not know {', '.join(unknown[:5])}: train a velocity "
            "model of these classes first"
        )


def adapted_classes(sources: list[int | None], classes: list[str], null_class: int) -> Tensor:
    """`TrainingModel.class_ids` of a LoRA run, in which the pipeline that is adapted keeps its classes."""
    unknown = [name for name, source in zip(classes, sources, strict=True) if source is None]
    if unknown:
        raise ConfigError(
            f"LoRA leaves the class embeddings alone, and {', '.join(unknown[:5])} is no class of model.start_from: "
            "name the data's classes as it does, or train the new ones first (without lora.rank)"
        )
    return torch.tensor([*sources, null_class])


def freeze(built: TrainingModel, model: ModelConfig) -> list[str]:
    """Freeze the networks that the configuration names, and weights that the loss does not depend on; dropout stays
    on. Returns a line about each.
    """
    notes = []
    for part in model.frozen:
        getattr(built, part).requires_grad_(False)
        notes.append(f"frozen: {part} (its dropout and label dropout stay on)")
    if model.images_in_sequence == 1 and "condition_encoder" not in model.frozen:
        built.condition_encoder.reference_projection.requires_grad_(False)
        notes.append("frozen: condition_encoder.reference_projection (nothing reads it in a 1-step model)")
    return notes


def recommended_by(folder: str | None) -> dict[str, Any]:
    """What the pipeline folder to start from says of its sampling: the entries of its index and of its scheduler."""
    found: dict[str, Any] = {}
    for name in ("model_index.json", "scheduler/scheduler_config.json") if folder is not None else ():
        path = Path(str(folder), name)
        found |= json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def sampling_settings(config: TrainConfig) -> dict[str, Any]:
    """The values of `SamplingConfig`: those set, else those of the pipeline to start from, else the defaults."""
    found = recommended_by(config.model.start_from)
    settings = {key: default if found.get(key) is None else found[key] for key, default in DEFAULT_SAMPLING.items()}
    if config.loss.kind == "flow_map":
        settings |= FLOW_MAP_SAMPLING
    return settings | {key: value for key, value in vars(config.sampling).items() if value is not None}


def teacher_guidance(config: TrainConfig) -> list[float]:
    """The guidance that a flow map learns, for each image of its sequences: that set, else the teacher's own."""
    scale = config.loss.guidance_scale
    if scale is None:
        scale = recommended_by(config.model.start_from).get("guidance_scale")
    try:
        return guidance_per_image(1.0 if scale is None else scale, config.model.images_in_sequence)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"loss.guidance_scale: {error}") from None


def build_pipeline(
    built: TrainingModel, vae: AutoencoderKL, sampling: Mapping[str, Any], classes: list[str]
) -> TransDiffPipeline:
    """The inference pipeline around the networks of a run, with `sampling_settings`."""
    scheduler: SchedulerMixin = FlowMatchEulerMaruyamaScheduler(
        drift_scale=sampling["drift_scale"], diffusion_scale=sampling["diffusion_scale"]
    )
    if built.transformer.config.num_flow_map_layers > 0:
        scheduler = FlowMapScheduler()
    return TransDiffPipeline(
        condition_encoder=built.condition_encoder,
        transformer=built.transformer,
        vae=vae,
        scheduler=scheduler,
        id2label=dict(enumerate(classes)),
        guidance_scale=sampling["guidance_scale"],
        num_inference_steps=sampling["num_inference_steps"],
    )
