from .hub import TransDiffHubMixin
from .lora import TransDiffLoraLoaderMixin
from .original_repository import (
    download_original,
    explain_original_repository,
    save_converted,
)
from .single_file import TransDiffSingleFileMixin


__all__ = [
    "TransDiffHubMixin",
    "TransDiffLoraLoaderMixin",
    "TransDiffSingleFileMixin",
    "download_original",
    "explain_original_repository",
    "save_converted",
]
