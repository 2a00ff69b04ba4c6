"""Make diffusers' loaders know this package's classes.

diffusers resolves every component of a `model_index.json` as a pair [library, class]. For a class outside diffusers
three things decide whether that works, from a folder and from the Hub alike:

* `LOADABLE_CLASSES` must know the library, or `save_pretrained` writes the class's module path instead of the
  package's name: a path that ties a saved checkpoint to today's file layout, and that the Hub loader refuses.
* The package root must show `ModelMixin` and `SchedulerMixin`, the base classes by which the loader picks
  `from_pretrained` (see `__init__.py`).
* `diffusers` must have the classes as attributes: `DiffusionPipeline.from_pretrained`, `AutoModel` and a scheduler's
  `compatibles` look them up there.
"""

import diffusers
from diffusers.hooks._helpers import (
    AttentionProcessorMetadata,
    AttentionProcessorRegistry,
    TransformerBlockMetadata,
    TransformerBlockRegistry,
    _skip_attention___ret___hidden_states,
)
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES


def register_with_diffusers(*classes: type) -> None:
    """Register classes of this package; registering again changes nothing."""
    library = __name__.split(".")[0]
    methods = ["save_pretrained", "from_pretrained"]
    LOADABLE_CLASSES.setdefault(library, {"ModelMixin": methods, "SchedulerMixin": methods})
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)


def register_hook_targets(blocks: list[type], attention_processor: type) -> None:
    """Tell diffusers' caches (FirstBlockCache, MagCache) and layer skipping what blocks and attention return.

    Both return the hidden states alone, and skipping an attention layer hands on its input.
    """
    for block in blocks:
        metadata = TransformerBlockMetadata(return_hidden_states_index=0, return_encoder_hidden_states_index=None)
        TransformerBlockRegistry.register(block, metadata)
    skip = AttentionProcessorMetadata(skip_processor_output_fn=_skip_attention___ret___hidden_states)
    AttentionProcessorRegistry.register(attention_processor, skip)
