"""Saving models and pipelines: only what loads again as what was seen, whole or not at all, and one form of it."""

import glob
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..files import give_usual_mode, new_files
from .adapters import adapter_layers, adapter_names, fused_adapters


# A model's weights: whole or a shard, of a variant or not (two ways to name a shard's), or the index of the shards.
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(
    rf"diffusion_pytorch_model(?:(?:{_SHARD})?(?:\.(?P<variant>.+?))?(?:{_SHARD})?\.(?:safetensors|bin)"
    r"|\.(?:safetensors|bin)\.index(?:\.(?P<index_variant>.+))?\.json)"
)


HUB_OPTIONS = ("repo_id", "commit_message", "private", "token", "create_pr")
"""Arguments of `save_pretrained` for `push_to_hub`."""


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
        remedy = (
            "Call unload_lora_weights() first, which leaves what is fused in the weights, or unfuse_lora() as well"
        )
    raise ValueError(
        f"{' and '.join(adapted)} cannot be saved with the LoRA adapters {names} {state}: the weights would have "
        f"names that no model has. {remedy}"
    )


def _variant(file_name: str) -> tuple[str | None] | None:
    """The variant, None without one, that a file of weights belongs to, in a tuple; None for other files."""
    found = _WEIGHTS.fullmatch(file_name)
    return None if found is None else (found["variant"] or found["index_variant"],)


def older_forms(present: Iterable[str], saved: Iterable[str]) -> list[str]:
    """Which of the files `present` are weights that mean the same as those `saved`, but in another form.

    That is in shards or not, as safetensors or not, of the same folder and the same variant. Paths have slashes.
    """
    saved = set(saved)
    forms = {(head, _variant(name)) for head, _, name in (path.rpartition("/") for path in saved)}
    return [
        path
        for path in present
        for head, _, name in [path.rpartition("/")]
        if path not in saved and _variant(name) is not None and (head, _variant(name)) in forms
    ]


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


@contextmanager
def one_form(folder: str | os.PathLike[str], last: str | None = None) -> Iterator[Path]:
    """`files.new_files` for models: removes weights that `folder` has in another form, which diffusers may prefer."""
    with new_files(folder, last) as scratch:
        yield scratch
        saved = _files(scratch)
    for path in older_forms(_files(Path(folder)), saved):
        Path(folder, path).unlink()


def upload_one_form(
    folder: str | os.PathLike[str],
    repo_id: str,
    path_in_repo: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> Any:
    """`huggingface_hub.upload_folder`; weights that the repository has in another form go in the same commit."""
    from huggingface_hub import (
        list_repo_files,
        upload_folder,
    )  # here, for exported code to name diffusers and torch only

    prefix = f"{path_in_repo.strip('/')}/" if path_in_repo else ""
    present = [path.removeprefix(prefix) for path in list_repo_files(repo_id, token=token) if path.startswith(prefix)]
    older = [glob.escape(path) for path in older_forms(present, _files(Path(folder)))]
    return upload_folder(
        repo_id=repo_id,
        folder_path=Path(folder),
        path_in_repo=path_in_repo,
        token=token,
        delete_patterns=older or None,
        **options,
    )


class SavingMixin:
    """`save_pretrained` and `push_to_hub` of a model: refused with LoRA layers in it, and one form of the weights."""

    # A pipeline hands a component the options that it sees in the signature.
    @wraps(ModelMixin.save_pretrained, assigned=(), updated=())
    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """`ModelMixin.save_pretrained`; a failure leaves what the folder has.

        Raises:
            ValueError: LoRA adapters are in the model.
        """
        check_saves({type(self).__name__: self})
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        with one_form(save_directory) as scratch:
            super().save_pretrained(scratch, *args, **kwargs)  # type: ignore[misc]
        if push_to_hub:
            # Once more, over the same files: diffusers uploads what it has just saved.
            super().save_pretrained(str(save_directory), *args, push_to_hub=True, **hub_options, **kwargs)  # type: ignore[misc]
            give_usual_mode(path for path in Path(save_directory).iterdir() if _variant(path.name) is not None)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """`PushToHubMixin.push_to_hub`, refused before there is a repository; see `save_pretrained`."""
        check_saves({type(self).__name__: self})
        return super().push_to_hub(*args, **kwargs)  # type: ignore[misc]

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        message = commit_message or f"Upload {type(self).__name__}"
        return upload_one_form(working_dir, repo_id, subfolder, token, commit_message=message, create_pr=create_pr)
