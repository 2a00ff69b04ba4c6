"""Saving models and pipelines: only what loads again as what was seen, whole or not at all, and one form of it."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import upload_folder
from torch import nn

from .adapters import adapter_layers, adapter_names, fused_adapters


# A model's weights: whole or a shard, of a variant or not (two ways to name a shard's), or the index of the shards.
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"diffusion_pytorch_model(?:(?:{_SHARD})?(?:\.(?P<variant>.+?))?(?:{_SHARD})?\.(?:safetensors|bin)"
    r"|\.(?:safetensors|bin)\.index(?:\.(?P<index_variant>.+))?\.json)"
)


def check_saves(components: dict[str, Any]) -> None:
    """Raise ValueError where a component has LoRA layers: what is saved with them does not load.

    Args:
        components: models, and whatever else a pipeline has, by the name that the error gives them.
    """
    models = {name: model for name, model in components.items() if isinstance(model, nn.Module)}
    adapted = [name for name, model in models.items() if adapter_layers(model)]
    if not adapted:
        return
    names = list(dict.fromkeys(name for part in adapted for name in adapter_names(models[part])))
    state = "loaded"
    remedy = (
        "Either keep the LoRA apart: save_lora_weights(), then unload_lora_weights() and save; or make it part of the "
        "weights: fuse_lora(), then unload_lora_weights() and save"
    )
    if any(fused_adapters(models[part]) for part in adapted):
        state = "fused and still loaded"
        remedy = "Call unload_lora_weights() first, which leaves what is fused in the weights, or unfuse_lora() as well"
    raise ValueError(
        f"{' and '.join(adapted)} cannot be saved with the LoRA adapters {names} {state}: the weights would have names "
        f"that no model has. {remedy}"
    )


def variant_of(file_name: str) -> tuple[str | None] | None:
    """The variant, None without one, that a file of weights belongs to, in a tuple; None for other files."""
    found = _WEIGHTS.fullmatch(file_name)
    return None if found is None else (found["variant"] or found["index_variant"],)


def older_forms(folder: Path, saved: Iterable[str]) -> list[Path]:
    """Files of weights in `folder` that mean the same as those just saved, of the same variant, but are others."""
    saved = set(saved)
    variants = {variant_of(name) for name in saved} - {None}
    return [file for file in folder.iterdir() if file.name not in saved and variant_of(file.name) in variants]


@contextmanager
def saved_whole(folder: str | os.PathLike[str], last: str | None = None) -> Iterator[Path]:
    """A folder to save to, whose files are moved to `folder` when all are written.

    Weights that `folder` has in another form (in shards, as .bin) are removed: diffusers would load those.

    Args:
        last: name of the file that is moved last, because it says what the others are.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as scratch:
        yield Path(scratch)
        files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file.name == last):
            place = target / file.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)
    names: dict[Path, set[str]] = {}
    for file in files:
        place = target / file.relative_to(scratch)
        names.setdefault(place.parent, set()).add(place.name)
    for parent, saved in names.items():
        for file in older_forms(parent, saved):
            file.unlink()


class SavingMixin:
    """`save_pretrained` and `push_to_hub` of a model: refused with LoRA layers in it, and one form of the weights."""

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """`ModelMixin.save_pretrained`; a failure leaves what the folder has.

        Raises:
            ValueError: LoRA adapters are in the model.
        """
        check_saves({type(self).__name__: self})
        with saved_whole(save_directory) as scratch:
            super().save_pretrained(scratch, *args, **_without_hub_options(kwargs))  # type: ignore[misc]
        if push_to_hub:
            super().save_pretrained(str(save_directory), *args, push_to_hub=True, **kwargs)  # type: ignore[misc]
