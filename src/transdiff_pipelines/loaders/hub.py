"""Pushing a pipeline to the Hub: with its code where asked for, and with a model card where there is none."""

import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, create_repo, file_exists

from ..attribution import ATTRIBUTION_NAME
from ..code_export import PACKAGE, self_contained_source
from ..files import new_file
from ..model_card import CARD_NAME, pipeline_card
from ..models import ARConditionEncoder, TransDiffTransformer2DModel
from ..models.saving import HUB_OPTIONS, check_saves, one_form, upload_one_form


PIPELINE_MODULE = "pipeline"
"""Name, without ".py", of the file in which diffusers looks for a repository's pipeline class."""

INDEX_NAME = DiffusionPipeline.config_name

# The components' classes are in files of their own; the pipeline's file names them in annotations only.
_STAND_INS = {cls.__name__: "ModelMixin" for cls in (ARConditionEncoder, TransDiffTransformer2DModel)}

# Base classes that the pipeline's file leaves out: converting and exporting need the package itself.
_LEFT_OUT = ("TransDiffSingleFileMixin", "TransDiffHubMixin")

_CODE_NOTE = """
Written by transdiff_pipelines, so that this repository also works where the package is not installed:
`DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)`. Change the package, not this file.
"""


class TransDiffHubMixin:
    """`save_pretrained` and `push_to_hub` with `include_code`, and reading what they wrote."""

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The index of a repository with code names its files' classes; the installed ones stand for them."""
        # diffusers before 0.41 also passes the entries of a DDUF archive.
        index = super()._dict_from_json_file(json_file, *args, **kwargs)  # type: ignore[misc]
        return {name: _installed(name, value) for name, value in index.items()}

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        *,
        include_code: bool = False,
        **kwargs: Any,
    ) -> None:
        """`DiffusionPipeline.save_pretrained`; with `push_to_hub` the folder is then uploaded.

        Of the weights the folder keeps this form alone, in shards or not, as safetensors or not; those of other
        variants stay. A failure leaves what the folder has. The attribution of a bundled model goes along.

        Args:
            include_code: also write the package's code, one self-contained file for the pipeline and one for each
                component, for use without the package:
                `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. `TransDiffPipeline` loads the
                folder all the same, with its own code and no trust.
            kwargs: with `push_to_hub`, its `repo_id` (unless given, the folder's name), `commit_message`, `private`,
                `token` and `create_pr`.

        Raises:
            ValueError: LoRA adapters are loaded; the message says how to save them.
        """
        check_saves(self.components)  # type: ignore[attr-defined]
        _ = self.labels  # type: ignore[attr-defined]  # raises where the names are not those of the encoder's classes
        hub_options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        with one_form(save_directory, last=INDEX_NAME) as scratch:
            super().save_pretrained(  # type: ignore[misc]
                scratch, safe_serialization, variant=variant, max_shard_size=max_shard_size, **kwargs
            )
            if include_code:
                write_code(type(self), scratch)
            # CC BY asks that whoever passes a model on names those whose works it learned from.
            if credited := self._of_origin(ATTRIBUTION_NAME):
                _write(scratch / ATTRIBUTION_NAME, credited.read_text(encoding="utf-8"))
        if push_to_hub:
            hub_options.setdefault("repo_id", Path(save_directory).name)
            self._push_folder(Path(save_directory), include_code=include_code, **hub_options)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        include_code: bool = False,
    ) -> CommitInfo:
        """Upload the pipeline to a repository of the Hub, which is made if it does not exist.

        A repository without a model card gets one: that of the folder the pipeline was loaded from (training writes
        one), or else a short one. A card that is there already is left alone.

        Args:
            repo_id: the repository, `user/name`, or `name` for the user of the token.
            private: whether a new repository is private; unset, the account's own setting.
            create_pr: open a pull request instead of committing.
            variant: marks the weights' files, `diffusion_pytorch_model.VARIANT.safetensors`.
            subfolder: a folder of the repository to upload to instead of its top; no card is written then.
            include_code: see `save_pretrained`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant=variant, include_code=include_code)
            return self._push_folder(
                Path(folder), repo_id, commit_message, private, token, create_pr, subfolder, include_code
            )

    def _push_folder(
        self,
        folder: Path,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
        include_code: bool = False,
    ) -> CommitInfo:
        repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        has_card = file_exists(repo_id, CARD_NAME, token=token)
        if not (has_card or subfolder or (folder / CARD_NAME).exists()):
            self._write_card(folder, repo_id, include_code)
        return upload_one_form(
            folder,
            repo_id,
            subfolder,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            token=token,
            create_pr=create_pr,
            ignore_patterns=[CARD_NAME] if has_card else None,
        )

    def _of_origin(self, name: str) -> Path | None:
        """A file of the folder that the pipeline was loaded from, if there are both."""
        origin = self.config.get("_name_or_path")  # type: ignore[attr-defined]
        return Path(origin, name) if origin and Path(origin, name).is_file() else None

    def _write_card(self, folder: Path, repo_id: str, include_code: bool) -> None:
        """The card of the folder this pipeline came from, with the pictures it shows, or a new one."""
        card = self._of_origin(CARD_NAME)
        if card is None:
            credited = self._of_origin(ATTRIBUTION_NAME)
            credits = credited.read_text(encoding="utf-8").strip() if credited else ""
            (folder / CARD_NAME).write_text(pipeline_card(self, repo_id, include_code, credits), encoding="utf-8")
            return
        text = card.read_text(encoding="utf-8")
        (folder / CARD_NAME).write_text(text, encoding="utf-8")
        for picture in re.findall(r"!\[[^]]*\]\(([\w.-]+)\)", text):
            if shown := self._of_origin(picture):
                shutil.copyfile(shown, folder / picture)


def write_code(pipeline_class: type, folder: Path) -> None:
    """Add to a saved pipeline the files with which it works without this package, and name them in its index.

    The index is written last: until then the folder is one for the installed package.
    """
    index_path = folder / INDEX_NAME
    index = json.loads(index_path.read_text(encoding="utf-8"))
    for component, entry in index.items():
        if not (isinstance(entry, list) and entry[0] == PACKAGE):
            continue
        cls = getattr(sys.modules[PACKAGE], entry[1])
        module = cls.__module__.split(".")[-1]
        _write(folder / component / f"{module}.py", self_contained_source(cls, _CODE_NOTE))
        index[component] = [module, cls.__name__]
    index["_class_name"] = [PIPELINE_MODULE, pipeline_class.__name__]
    source = self_contained_source(pipeline_class, _CODE_NOTE, _STAND_INS, _LEFT_OUT)
    _write(folder / f"{PIPELINE_MODULE}.py", source)
    _write(index_path, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _is_own(cls: type) -> bool:
    return cls.__module__.split(".")[0] == PACKAGE


def _installed(name: str, value: Any) -> Any:
    """An entry of a pipeline's index, with this package's class in the place of one from a file of the repository."""
    if not (isinstance(value, list) and len(value) == 2):
        return value
    if name == "_class_name":
        return value[1]
    own = getattr(sys.modules[PACKAGE], str(value[1]), None)
    return [PACKAGE, value[1]] if isinstance(own, type) and _is_own(own) else value


def _write(path: Path, text: str) -> None:
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
