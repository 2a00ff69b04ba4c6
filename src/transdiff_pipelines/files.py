"""Files and folders that appear whole or not at all: written beside their place, then renamed."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def new_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces it at the end of the block.

    The block that fails leaves what was there; its folder is made where it does not exist. The temporary name has no
    suffix of `path`, so that a writer which reads the format off the name must be told it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make an empty temporary file where `new_file` would and remove it: what stops that would stop the real one.

    Worth asking before long work. Where the folder does not exist yet, the nearest one above it is tried.

    Raises:
        OSError: no permission, a name too long, a read-only disk; the message names the path.
    """
    path = Path(path)
    folder = next(parent for parent in path.parents if parent.exists())
    probe = _temporary(folder / path.name)
    try:
        probe.touch()
    except OSError as error:
        raise type(error)(f"output {path} cannot be written: {error.strerror}; name another place") from error
    probe.unlink()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end of the block; if the block fails, nothing is left.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The workplace is a neighbour, because a rename must stay within one file system. The folder is made inside of it,
    # because a temporary folder itself can be read by its user alone.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workplace:
        folder = Path(workplace) / path.name
        folder.mkdir()
        yield folder
        os.replace(folder, path)


@contextmanager
def new_files(folder: str | os.PathLike[str], last: str | None = None) -> Iterator[Path]:
    """Yield an empty folder whose files, at the end of the block, move to their places in `folder` over older ones.

    The block that fails leaves `folder` as it was.

    Args:
        last: name of the file that moves last, because it says what the others are.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as scratch:
        yield Path(scratch)
        files = sorted(file for file in Path(scratch).rglob("*") if file.is_file())
        for file in sorted(files, key=lambda file: file.name == last):
            place = folder / file.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Raise FileExistsError unless `path` is missing or an empty folder; ask before long work, not only after it."""
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; remove it, or name another output folder (it is not an empty folder)")
