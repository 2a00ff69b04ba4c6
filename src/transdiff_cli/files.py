"""Where `generate` writes: names checked before the work, files that appear whole."""

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image


if TYPE_CHECKING:
    from transdiff_pipelines.generation import GenerationSettings

GRID_FILE = Path("transdiff.png")
SINGLE_FILES = Path("transdiff-{label}-{seed}.png")
FOLDER_FILES = "{label}-{seed}.png"

_FIELD = re.compile(r"\{(\w*)\}")
_FIELDS = ("label", "seed", "number")


def output_name(output: Path | None, grid: bool) -> Path:
    """The name of the grid, or the pattern of the single files' names, checked as far as it can be without labels.

    Raises:
        ValueError: it is no image's name, or fits the other way of writing.
        OSError: its folder does not exist, or it is one itself and one file was to be written.
    """
    if output is None:
        return GRID_FILE if grid else SINGLE_FILES
    fields = _FIELD.findall(str(output))
    if not grid and not fields and (output.is_dir() or not output.suffix):
        if output.is_file():
            raise FileExistsError(f"output {output} is a file; name a folder, or a pattern such as {SINGLE_FILES}")
        return _existing_parent(output) / FOLDER_FILES
    if grid and fields:
        raise ValueError(f"output {str(output)!r} is a pattern for many files; add --no-grid to write them")
    unknown = [field for field in fields if field not in _FIELDS]
    if unknown:
        known = ", ".join(f"{{{field}}}" for field in _FIELDS)
        raise ValueError(f"output {str(output)!r} has {{{unknown[0]}}}; a pattern can have {known}")
    if Image.registered_extensions().get(output.suffix.lower()) not in Image.SAVE:
        example = f"name it {output.stem}.png, for example" + ("; or --no-grid for a folder" if grid else "")
        raise ValueError(f"output {str(output)!r} has no suffix of an image format; {example}")
    check_format(output)
    if output.is_dir():
        raise IsADirectoryError(f"output {output} is a folder; name a file in it, or add --no-grid for single files")
    return output if _FIELD.search(str(output.parent)) else _existing_parent(output)


def single_files(pattern: Path, settings: "GenerationSettings") -> list[Path]:
    """The file of every image.

    Raises:
        ValueError: two images would have the same.
        OSError: a folder does not exist.
    """
    digits = len(str(settings.num_images - 1))
    paths = []
    for number, label in enumerate(settings.label_of_each):
        paths.append(_filled(pattern, label=label, seed=settings.seed + number, number=f"{number:0{digits}d}"))
    if len(set(paths)) < len(paths):
        better = pattern.with_name(f"{pattern.stem}-{{seed}}{pattern.suffix}")
        raise ValueError(
            f"output {str(pattern)!r} is one name for several of {len(paths)} images; put {{seed}} or {{number}} in "
            f"it, as in {str(better)!r}, or name a folder"
        )
    for folder in {path.parent for path in paths} - {pattern.parent}:
        _existing_parent(folder / pattern.name)
    return paths


def check_format(path: Path, width: int = 16, height: int = 16) -> None:
    """Encode an empty image in memory and look whether it comes out whole; of a large one a row and a column.

    Raises:
        ValueError: the format, named by the suffix, has no colours, cannot be written here or is not that large.
    """
    file_format = Image.registered_extensions()[path.suffix.lower()]
    small = max(width, height) <= 256
    for size in [(width, height)] if small else [(width, 1), (1, height)]:
        encoded = io.BytesIO()
        try:
            Image.new("RGB", size).save(encoded, format=file_format)
            written = Image.open(encoded).size if file_format in Image.OPEN else size
            reason = None if written == size else f"it makes {written[0]} x {written[1]} of {size[0]} x {size[1]}"
        except Exception as error:  # each format has its own way to say no
            reason = str(error) or type(error).__name__
        if reason is not None:
            raise ValueError(
                f"output {str(path)!r}: a {file_format} file cannot hold {width} x {height} pixels in colour here "
                f"({reason}); name it {path.stem}.png" + ("" if small else ", or draw fewer images into one file")
            )


def save_image(image: Image.Image, path: Path, settings: "GenerationSettings") -> None:
    """Write with the settings in it; an interrupted write leaves what was there."""
    from transdiff_pipelines.files import new_file

    options: dict[str, Any] = {"pnginfo": settings.png_info()} if keeps_settings(path) else {}
    with new_file(path) as temporary:
        image.save(temporary, format=Image.registered_extensions()[path.suffix.lower()], **options)


def keeps_settings(path: Path) -> bool:
    """Whether a file of this name has room for the settings."""
    return path.suffix.lower() == ".png"


def _filled(pattern: Path, **values: int | str) -> Path:
    return Path(_FIELD.sub(lambda match: str(values[match[1]]), str(pattern)))


def _existing_parent(path: Path) -> Path:
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder of output {path} does not exist; make it first: mkdir -p {path.parent}")
    return path
