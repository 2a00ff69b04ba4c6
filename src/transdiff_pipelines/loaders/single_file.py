"""Loading the authors' checkpoints through the pipeline class, the diffusers way."""

import os
from typing import Any, Self

import torch
from diffusers import AutoencoderKL
from huggingface_hub import hf_hub_download

from ..diffusers_internals import diffusers_internal
from ..files import INDEX, pipeline_folder, why_no_pipeline
from .original_checkpoint import load_original_components
from .original_repository import explain_original_repository
from .shared_weights import load_shared


class TransDiffSingleFileMixin:
    """`from_single_file` for the authors' `.pth` files, and a helpful end for `from_pretrained` on them."""

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path: str | os.PathLike[str],
        *,
        vae: str | os.PathLike[str] | AutoencoderKL,
        num_attention_heads: int | None = None,
        preset: str | None = None,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
    ) -> Self:
        """Build the pipeline from one of the authors' checkpoints; see `convert_original_checkpoint`.

        Args:
            pretrained_model_link_or_path: a checkpoint's path, or its link on the Hub
                (`https://huggingface.co/zhendch/Transdiff/blob/main/transdiff_l/checkpoint-last.pth`).
            vae: the VAE's path or link, a folder with an `AutoencoderKL`, or the model itself.
            num_attention_heads: heads, for widths other than those of the published sizes.
            preset: a published model whose sampling settings to use where the shapes match none.
            dtype: the weights' type, float32 unless given. `torch_dtype` is diffusers' older name for it.
        """
        checkpoint = _local_file(pretrained_model_link_or_path)
        if not isinstance(vae, AutoencoderKL):
            vae = _local_file(vae)
        dtype = dtype or torch_dtype or torch.float32
        return cls(**load_original_components(checkpoint, vae, num_attention_heads, preset, dtype))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """`DiffusionPipeline.from_pretrained`, which also takes the folder of a training run.

        It alone loads a folder that shares weights with the one beside it, as that of `DIGITS_FLOW_MAP` does.

        Raises:
            OSError: a folder without a pipeline; the message says what it is, and of the authors' own checkpoints how
                to convert them.
        """
        source = pretrained_model_name_or_path
        if explanation := explain_original_repository(source):
            raise OSError(explanation)
        if os.path.isdir(source):
            source = pipeline_folder(source)
            if not (source / INDEX).is_file():
                raise OSError(f"{source} {why_no_pipeline(source)}")
            kwargs |= load_shared(source, kwargs)
        return super().from_pretrained(source, **kwargs)  # type: ignore[misc]


def _local_file(link_or_path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    if not str(link_or_path).startswith(("https://", "http://")):
        return link_or_path
    extract = diffusers_internal("loaders.single_file_utils", "_extract_repo_id_and_weights_name")
    repo, name = extract(str(link_or_path))
    if name is None:
        raise ValueError(f"{link_or_path} is no link to a file on the Hub; expected .../REPOSITORY/blob/main/FILE")
    return hf_hub_download(repo, name)
