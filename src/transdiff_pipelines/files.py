"""Files and folders that appear whole or not at all: written beside their place, then renamed.

They have the permissions of any new file, whatever wrote them: safetensors makes its files for their owner alone.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


INDEX = "model_index.json"
"""What a pipeline's folder has, and no other one."""


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
        give_usual_mode([temporary])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make an empty temporary file where `new_file` would and remove it: what stops that would stop the real one.

    Worth asking before long work. Where the folder does not exist yet, the nearest one above it is tried.

    Raises:
        OSError: no permission, a name too long, a read-only disk; the message names the path.
    """
    _probe(Path(path), Path(path))


def check_folder_writable(path: str | os.PathLike[str]) -> None:
    """Like `check_writable`, for a folder whose files are to be written, whether it exists yet or not.

    Raises:
        OSError: it is a file, or files cannot be written there; the message names the path.
    """
    path = Path(path)
    if path.is_file():
        raise NotADirectoryError(f"output {path} is a file; name a folder")
    _probe(path / "file", path)


def _probe(file: Path, named: Path) -> None:
    """Make an empty file beside where `file` would be, and remove it; an error is said of the path `named`."""
    try:
        folder = next(parent for parent in file.parents if parent.exists())
        probe = _temporary(folder / file.name)
        probe.touch()
        probe.unlink(missing_ok=True)  # processes of several machines may have one number, and thus one name
    except OSError as error:
        raise type(error)(f"output {named} cannot be written: {error.strerror}; name another place") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


@contextmanager
def new_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder that becomes `path` at the end of the block; if the block fails, nothing is left.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: it cannot be written; the message names it.
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
        give_usual_mode(folder.rglob("*"))
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
        give_usual_mode(files)
        for file in sorted(files, key=lambda file: file.name == last):
            place = folder / file.relative_to(scratch)
            place.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, place)


def give_usual_mode(paths: Iterable[Path]) -> None:
    """Give files the permissions that a new file has in their folder; folders among the paths stay as they are.

    A new file is made to see which these are: asking for the umask sets it for a moment, for all threads.
    """
    files = [path for path in paths if path.is_file()]
    if not files:
        return
    probe = _temporary(files[0].with_name("mode"))
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in files:
        if file.stat().st_mode != mode:  # some file systems have one mode for all, and refuse to change it
            file.chmod(mode)


def refuse_existing(path: str | os.PathLike[str]) -> None:
    """Check that `new_folder` can make `path`; worth asking before long work, not only after it.

    Raises:
        FileExistsError: `path` exists and is not an empty folder.
        OSError: it cannot be written, as in `check_writable`.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} exists; remove it, or name another output folder (it is not an empty folder)")
    check_writable(path)


def pipeline_folder(folder: str | os.PathLike[str]) -> Path:
    """The folder itself, or where it is that of a training run, the pipeline that the run has left in it."""
    folder = Path(folder)
    inner = folder / "pipeline"
    is_run = not (folder / INDEX).is_file() and (inner / INDEX).is_file()
    return inner if is_run else folder


def why_no_pipeline(folder: str | os.PathLike[str]) -> str:
    """What a folder is that `pipeline_folder` finds no pipeline in, to follow its name in an error."""
    folder = Path(folder)
    if (folder / "lora").is_dir() or any(folder.glob("pytorch_lora_weights.*")):
        lora = folder / "lora" if (folder / "lora").is_dir() else folder
        return (
            "holds LoRA adapters and no pipeline; load the pipeline that they were trained on, and give it "
            f"pipe.load_lora_weights({str(lora)!r}), or --lora {lora} on the command line"
        )
    if (folder.parent / INDEX).is_file():
        return f"is a part of a pipeline; name the whole of it, {folder.parent}"
    unfinished = sorted((folder / "checkpoints").glob("step-*/pipeline")) or sorted(folder.glob("step-*/pipeline"))
    if unfinished:
        return f"is a training run that has not finished; its newest checkpoint has the pipeline {unfinished[-1]}"
    return (
        f"is a folder without {INDEX}; expected one that save_pretrained wrote, or a finished training run, which has "
        "one in its folder pipeline/"
    )


def home_path(text: str) -> Path:
    """The path of an argument, with `~` expanded: no shell does that in `--output=~/name`."""
    return Path(text).expanduser()
