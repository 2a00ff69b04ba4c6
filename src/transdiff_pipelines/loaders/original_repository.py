"""From the authors' Hub repository to a diffusers folder on disk."""

import os
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download

from ..files import new_folder
from ..hub_access import check_hub_has
from ..model_card import CARD_NAME, published_card
from ..presets import (
    ORIGINAL_FILENAME,
    ORIGINAL_REPOSITORY,
    ORIGINAL_VAE_FOLDER,
    PUBLISHED,
    PublishedModel,
    published_model,
)


def download_original(model: str, repo: str = ORIGINAL_REPOSITORY) -> tuple[Path, Path]:
    """Fetch (or find in the Hub cache) one of the authors' checkpoints and their VAE.

    Args:
        model: a published model's folder, e.g. "transdiff_l_mrar".
        repo: a repository laid out as the authors' is.

    Returns:
        The paths of the checkpoint and of the VAE's file.

    Raises:
        ValueError: `model` is not a published model.
        OSError: the repository does not exist, or the Hub cannot be reached.
    """
    folders = published_model(model).folder, ORIGINAL_VAE_FOLDER
    check_hub_has(repo)
    checkpoint, vae = (Path(hf_hub_download(repo, f"{folder}/{ORIGINAL_FILENAME}")) for folder in folders)
    return checkpoint, vae


def save_converted(
    pipeline: DiffusionPipeline, output: str | os.PathLike[str], card: PublishedModel | None = None
) -> Path:
    """Write a pipeline to a new folder, whole or not at all.

    Args:
        card: the published model that these weights are, to write its model card too: `push_to_hub` takes it along.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    with new_folder(output) as folder:
        pipeline.save_pretrained(folder)
        if card is not None:
            (folder / CARD_NAME).write_text(published_card(card), encoding="utf-8")
    return Path(output)


def explain_original_repository(name_or_path: str | os.PathLike[str]) -> str | None:
    """How to convert what `name_or_path` holds, if that is the authors' checkpoints instead of a diffusers folder.

    None for anything else. Only local files are looked at: the authors' repository is known by its name.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if (path / "model_index.json").is_file():
            return None
        checkpoints = [*path.glob(ORIGINAL_FILENAME), *sorted(path.glob(f"*/{ORIGINAL_FILENAME}"))]
        if not checkpoints:
            return None
        held = ", ".join(str(checkpoint.relative_to(path)) for checkpoint in checkpoints)
        command = "transdiff convert CHECKPOINT.pth --vae VAE.pth --output FOLDER"
    elif str(name_or_path).strip("/").lower() == ORIGINAL_REPOSITORY.lower():
        held = ", ".join(PUBLISHED)
        command = f"transdiff convert --repo {ORIGINAL_REPOSITORY} --model transdiff_l_mrar --output FOLDER"
    else:
        return None
    return (
        f"{name_or_path} holds the authors' own checkpoints ({held}), not a diffusers pipeline. Convert one first:\n\n"
        f"    {command}\n\n"
        'and load the result with TransDiffPipeline.from_pretrained("FOLDER"). TransDiffPipeline.from_single_file('
        "checkpoint, vae=...) converts in memory."
    )
