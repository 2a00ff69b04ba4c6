"""Uploading the result of a run to the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.utils import HFValidationError, validate_repo_id

from training.settings.config import ConfigError


class PublishError(RuntimeError):
    """The result of a run could not be uploaded to the Hub. It is complete on disk."""


def check_repository(repo_id: str) -> None:
    """Check before a run begins what would make the upload at its end fail.

    Raises:
        ConfigError: if `repo_id` is no name of a repository, or if nobody is logged in.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"push_to_hub is {repo_id!r}: {error}") from None
    if get_token() is None:
        raise ConfigError(f"push_to_hub is {repo_id!r}, but no token is set: run `hf auth login`, or set HF_TOKEN")


def publish(folder: Path, repo_id: str) -> str:
    """Upload a folder to a model repository, which is made private if it does not exist yet; returns its address.

    Raises:
        PublishError: with the command that tries again.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo_id, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Trained with transdiff_pipelines"
        )
    except Exception as error:  # of any kind: network and server fail in many ways, and the run itself is finished
        raise PublishError(
            f"{folder} is complete but was not pushed to {repo_id} ({type(error).__name__}: {error}). Try again with: "
            f"hf upload {repo_id} {shlex.quote(str(folder))}"
        ) from error
    return str(address)
