"""What diffusers' and accelerate's hooks on the transformer ask of the denoising loop.

Offloading, layerwise casting and the approximating caches (FirstBlockCache, FasterCache, PyramidAttentionBroadcast,
MagCache, TaylorSeer) are hooks around the `forward` of the model and of its parts.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import DiffusionPipeline, FasterCacheConfig, ModelMixin
from torch import nn


def has_hooked_parts(model: nn.Module) -> bool:
    """Whether hooks must see the model's own `forward` run.

    A layer used outside of it would be missed by a cache, and its weights may be on another device. accelerate's
    hook on the whole model is no obstacle: `apply_forward_hook` serves it.
    """
    return any(_is_hooked(part) for part in model.modules() if part is not model) or _has_diffusers_hook(model)


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
