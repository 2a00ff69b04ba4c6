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

from typing import Any

import diffusers
from diffusers.utils import logging

from .diffusers_internals import diffusers_internal


logger = logging.get_logger(__name__)


def register_with_diffusers(*classes: type) -> None:
    """Register classes of this package; registering again changes nothing.

    Raises:
        ImportError: this diffusers keeps its table of loadable classes elsewhere. Without an entry, a pipeline would
            be saved in a form that no other version could load.
    """
    library = __name__.split(".")[0]
    methods = ["save_pretrained", "from_pretrained"]
    loadable = diffusers_internal("pipelines.pipeline_loading_utils", "LOADABLE_CLASSES")
    loadable.setdefault(library, {"ModelMixin": methods, "SchedulerMixin": methods})
    for cls in classes:
        setattr(diffusers, cls.__name__, cls)


def register_hook_targets(blocks: list[type], attention_processor: type) -> None:
    """Tell diffusers' caches (FirstBlockCache, MagCache) and layer skipping what blocks and attention return.

    Both return the hidden states alone, and skipping an attention layer hands on its input. Where diffusers' tables
    have moved or changed, only those caches are lost: that is a warning.
    """
    try:
        for block in blocks:
            _register_hook_target("TransformerBlock", block, **_BLOCK_OUTPUT)
        _register_hook_target("AttentionProcessor", attention_processor, skip_processor_output_fn=_hidden_states)
    except (ImportError, AttributeError, TypeError) as error:
        logger.warning(f"FirstBlockCache, MagCache and layer skipping will not work: {error}")


_BLOCK_OUTPUT = {"return_hidden_states_index": 0, "return_encoder_hidden_states_index": None}


def _register_hook_target(kind: str, cls: type, **metadata: Any) -> None:
    make_metadata = diffusers_internal("hooks._helpers", f"{kind}Metadata")
    diffusers_internal("hooks._helpers", f"{kind}Registry").register(cls, make_metadata(**metadata))


def _hidden_states(attn: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states
