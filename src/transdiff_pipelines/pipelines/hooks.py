"""What diffusers' and accelerate's hooks on the models ask of a call and of its denoising loop.

Offloading, layerwise casting and the approximating caches (FirstBlockCache, FasterCache, PyramidAttentionBroadcast,
MagCache, TaylorSeer) are hooks around the `forward` of the model and of its parts.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline, FasterCacheConfig, ModelMixin
from torch import nn

from ..models.attention import check_attention_kwargs


def has_hooked_parts(model: nn.Module) -> bool:
    """Whether hooks must see the model's own `forward` run.

    A layer used outside of it would be missed by a cache, and its weights may be on another device. accelerate's
    hook on the whole model is no obstacle: `apply_forward_hook` serves it.
    """
    return any(_is_hooked(part) for part in model.modules() if part is not model) or _has_diffusers_hook(model)


def state_held_by(models: Sequence[nn.Module], attention_kwargs: Mapping[str, Any] | None) -> str | None:
    """What keeps the state of a running call in the models themselves, in words; None where nothing does."""
    parts = [part for model in models for part in model.modules()]
    for model in models:
        if getattr(model, "is_cache_enabled", False):
            return f"the cache of {type(model).__name__}"
    if any(_has_diffusers_hook(part) or _moves_weights(part) for part in parts):
        return "a hook (offloading, layerwise casting, layer skipping)"
    scale = check_attention_kwargs(attention_kwargs)
    if scale != 1.0 and any(hasattr(part, "scale_layer") for part in parts):
        return f"attention_kwargs={{'scale': {scale}}}, which weighs the LoRA layers,"
    return None


def _moves_weights(module: nn.Module) -> bool:
    """Whether one of accelerate's hooks moves the module's weights; those of a `device_map` have `offload=False`."""
    hook = getattr(module, "_hf_hook", None)
    return any(one is not None and getattr(one, "offload", True) for one in getattr(hook, "hooks", [hook]))


def _is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") or _has_diffusers_hook(module)


def _has_diffusers_hook(module: nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and bool(registry.hooks)


@contextmanager
def hooks_freed(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Give offloaded weights back when the block ends, also where it fails: out of memory while decoding, for one."""
    try:
        yield
    finally:
        pipeline.maybe_free_model_hooks()


def check_cache(transformer: ModelMixin, guided_steps: Sequence[bool]) -> None:
    """Raise ValueError where FasterCache would take half of an unguided batch for its unconditional branch."""
    config = getattr(transformer, "_cache_config", None)
    if isinstance(config, FasterCacheConfig) and not config.is_guidance_distilled and not all(guided_steps):
        raise ValueError(
            f"FasterCache expects guidance at every step, but {guided_steps.count(False)} of {len(guided_steps)} go "
            "without it; set is_guidance_distilled=True in its config"
        )
