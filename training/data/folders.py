"""Folders of images with a sub-folder for each class: what is found in them, and what is passed over."""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .decoding import IMAGE_SUFFIXES
from .errors import DataError
from .examples import Example, IndexedSource
from .labels import chosen_classes, listed, natural_key
from .latent_cache import digest_of


# What systems and programs leave in folders, in lower case; names that begin with a dot are left out as well.
SYSTEM_NAMES = {
    "__macosx",
    "__pycache__",
    "@eadir",
    "@tmp",
    "@recycle",
    "@recently-snapshot",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "system volume information",
    "lost+found",
    "found.000",
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation", "dev"}


class FolderSource(IndexedSource):
    """A folder with one sub-folder per class, searched at any depth, links followed.

    Hidden files and folders and those of `SYSTEM_NAMES` are no part of it. Other files that are no images, images
    beside the class folders, and class folders that `classes` does not name are told of in `notes`.

    Args:
        root: the folder.
        classes: names of the sub-folders to use, in index order; None: all in natural order.

    Raises:
        DataError: if the folder is missing or cannot be read, if a class has no image or there is none at all, if a
            class has a name that is not UTF-8, or if the sub-folders look like splits.
        ConfigError: if `classes` names a folder that is not there.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            problem = "is a file, not a folder" if root.exists() else "does not exist"
            raise DataError(f"image folder {root} {problem} (data.images)")
        self.root = root
        self.passed_over: Counter[str] = Counter()
        above = {identity(folder) for folder in (root, *root.resolve().parents)}
        present, beside = [], Counter[str]()
        for entry in visible(root):
            if not is_folder(entry):
                beside["images" if is_image_name(entry.name) else "others"] += 1
            elif identity(Path(entry.path)) not in above:  # a link upwards holds all classes and is none
                present.append(entry.name)
        present.sort(key=natural_key)
        if classes is None:
            check_class_names(root, present)
        self.classes = present if classes is None else chosen_classes(classes, present, str(root))
        found = [find_images(root / name, set(above), self.passed_over) for name in self.classes]
        empty = [name for name, images in zip(self.classes, found, strict=True) if not images]
        if empty or not found:
            problem = f"class folders without images: {listed(empty)}" if empty else "no class folders"
            others = self._beside(beside, ". There are ") + self._passed_over(". There are ")
            raise DataError(f"{root} has {problem}; put images into one sub-folder per class{others}")
        self.files = [(path, label) for label, images in enumerate(found) for path, _ in images]
        self.stats = [status for images in found for _, status in images]
        self.length = len(self.files)
        self.digest = digest_of([(self.name(path), size(status)) for (path, _), status in self._with_stats()])
        left_out = [name for name in present if name not in self.classes]
        self.notes = [
            *([f"left out, since data.classes does not name them: {listed(left_out)}"] if left_out else []),
            *filter(None, (self._beside(beside, f"{root}: left out "), self._passed_over(f"{root}: passed over "))),
            *self._one_class_of_many_folders(),
        ]

    def _with_stats(self) -> list[tuple[tuple[Path, int], os.stat_result | None]]:
        return list(zip(self.files, self.stats, strict=True))

    def _beside(self, beside: Counter[str], before: str) -> str:
        count = beside["images"]
        return f"{before}{count} image(s) beside the class folders, in none of them" if count else ""

    def _passed_over(self, before: str) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.passed_over.most_common(5))
        count = sum(self.passed_over.values())
        return f"{before}{count} file(s) of kinds that Pillow does not open as images: {kinds}" if count else ""

    def _one_class_of_many_folders(self) -> list[str]:
        """An archive often unpacks into one more folder than meant."""
        inner = sorted({path.relative_to(self.root).parts[1:-1][:1] for path, _ in self.files})
        if len(self.classes) > 1 or len(inner) < 2 or () in inner:
            return []
        return [
            f"there is one class, {self.classes[0]}, with folders in it ({listed([name for (name,) in inner])}). If "
            f"those are the classes: --data.images={shlex.quote(str(self.root / self.classes[0]))}"
        ]

    def name(self, path: Path) -> str:
        return printable(path.relative_to(self.root).as_posix())

    def stamp(self) -> str:
        return digest_of([(self.name(path), times(status)) for (path, _), status in self._with_stats()])

    def example(self, index: int) -> Example:
        path, label = self.files[index]
        return Example(self.name(path), label, lambda: path)


def check_outside(place: Path, images: Path, what: str) -> None:
    """Raise DataError where `place`, which is to be written, lies inside the folder of images.

    A later run would take it for a class, and what is written there for its images.
    """
    if place.resolve().is_relative_to(images.resolve()):
        raise DataError(
            f"{what} {place} lies inside the image folder {images}, where its files would count as a class of images; "
            "name a folder beside it"
        )


def visible(folder: Path) -> list[os.DirEntry[str]]:
    """The entries of a folder, without hidden ones and those of systems."""
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except OSError as error:
        raise DataError(f"folder {printable(str(folder))} cannot be read: {error.strerror}") from error
    return [entry for entry in found if not (entry.name.startswith(".") or entry.name.lower() in SYSTEM_NAMES)]


def find_images(
    folder: Path, seen: set[tuple[int, int]], passed_over: Counter[str]
) -> list[tuple[Path, os.stat_result | None]]:
    """The image files of a class at any depth, in natural order, each with its status: None for a broken link.

    Args:
        folder: where to search.
        seen: identities of folders not to enter (again), for links may lead in circles.
        passed_over: counts other files, by suffix.
    """
    found: list[tuple[Path, os.stat_result | None]] = []
    if identity(folder) in seen:
        return found
    seen.add(identity(folder))
    for entry in sorted(visible(folder), key=lambda entry: (entry.is_symlink(), natural_key(entry.name))):
        path = Path(entry.path)
        if is_folder(entry):
            found += find_images(path, seen, passed_over)
            continue
        status = status_of(path)
        regular = status is None or stat.S_ISREG(status.st_mode)
        if regular and is_image_name(entry.name):
            found.append((path, status))
        elif entry.name.lower() not in SYSTEM_FILES:
            passed_over[printable(path.suffix.lower()) or "without suffix"] += 1
    return sorted(found, key=lambda item: natural_key(item[0].relative_to(folder).as_posix()))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one; a link that leads in a circle is none."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def status_of(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:
        return None


def identity(folder: Path) -> tuple[int, int]:
    """The same for a folder and for links to it."""
    status = folder.stat()
    return status.st_dev, status.st_ino


def size(status: os.stat_result | None) -> int:
    return -1 if status is None else status.st_size


def times(status: os.stat_result | None) -> tuple[int, ...]:
    """Size and times of a file; no program can set its last change back (st_ctime; on Windows it is the creation)."""
    return () if status is None else (status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def printable(name: str) -> str:
    """A name whose bytes are not UTF-8, or that has control characters, with these written as \\x.. or \\n."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


def check_class_names(root: Path, names: list[str]) -> None:
    """Raise DataError for folders whose names cannot be classes, or look like the splits of a data set."""
    broken = [printable(name) for name in names if printable(name) != name]
    if broken:
        raise DataError(f"{root} has classes whose names are not printable UTF-8: {listed(broken)}. Rename them")
    splits = [name for name in names if name.lower() in SPLIT_NAMES]
    if len(splits) > 1 or splits == names != []:
        first = next((name for name in splits if name.lower().startswith("train")), splits[0])
        raise DataError(
            f"{root} looks like a data set in splits ({listed(splits)}), not like a folder for each class. Name one "
            f"of them: --data.images={shlex.quote(str(root / first))}. If these are classes, list them in data.classes"
        )
