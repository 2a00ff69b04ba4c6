"""The six sets of emoji as npm packages of one format: fetched, read, and their icons as SVG.

A package holds `icons.json` (names to the bodies of SVGs, and aliases), `info.json` (licence, author) and, most of
them, `metadata.json` (categories).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from training.data.errors import DataError


VERSIONS = {
    "noto": "1.2.9",
    "noto-v1": "1.2.5",
    "twemoji": "1.2.5",
    "fluent-emoji": "1.2.7",
    "fluent-emoji-flat": "1.2.6",
    "emojione": "1.2.3",
}
"""The sets and the versions of their packages, `@iconify-json/NAME`. Categories are read of the first that has one."""


class Drawing(NamedTuple):
    """Which icon a name stands for, and how it is turned and mirrored: equal for names of the same picture."""

    icon: str
    mirrored: bool = False
    """left to right"""
    flipped: bool = False
    """upside down"""
    turns: int = 0
    """quarter turns clockwise, after mirroring"""


@dataclass(frozen=True)
class EmojiSet:
    """One set of emoji, of a package's files."""

    name: str
    icons: dict[str, Any]
    info: dict[str, Any]
    metadata: dict[str, Any]

    @cached_property
    def names(self) -> set[str]:
        """Every name of an icon, aliases included."""
        return {*self.icons["icons"], *self.icons.get("aliases", {})}

    @cached_property
    def categories(self) -> dict[str, str]:
        """The category of each icon that has one, by its name."""
        return {name: kind for kind, names in self.metadata.get("categories", {}).items() for name in names}

    def category(self, name: str) -> str | None:
        """Category of a name or of the icon that it is an alias of."""
        return self.categories.get(name) or self.categories.get(self.drawing(name).icon)

    def drawing(self, name: str) -> Drawing:
        """The icon that a name leads to over any number of aliases, each of which may mirror or turn it.

        Raises:
            DataError: if the aliases lead nowhere.
        """
        aliases, mirrored, flipped, turns = self.icons.get("aliases", {}), False, False, 0
        passed = [name]
        while passed[-1] not in self.icons["icons"]:
            alias = aliases.get(passed[-1])
            if alias is None or alias["parent"] in passed:
                raise DataError(f"set {self.name}: name {name} leads to no icon ({' -> '.join(passed)})")
            mirrored ^= bool(alias.get("hFlip"))
            flipped ^= bool(alias.get("vFlip"))
            turns += int(alias.get("rotate", 0))
            passed.append(alias["parent"])
        return Drawing(passed[-1], mirrored, flipped, turns % 4)

    def svg(self, name: str, size: int) -> str:
        """The drawing of a name as an SVG of `size x size` pixels; one that is not square stands in the middle."""
        drawing = self.drawing(name)
        icon = self.icons["icons"][drawing.icon]

        def length(side: str, default: float) -> float:
            return float(icon.get(side, self.icons.get(side, default)))

        left, top, width, height = length("left", 0), length("top", 0), length("width", 16), length("height", 16)
        x, y = left + width / 2, top + height / 2
        if drawing.turns % 2:
            width, height = height, width
        scale = f"{-1 if drawing.mirrored else 1} {-1 if drawing.flipped else 1}"
        transform = f"translate({x} {y}) rotate({90 * drawing.turns}) scale({scale}) translate({-x} {-y})"
        body = icon["body"] if drawing == Drawing(drawing.icon) else f'<g transform="{transform}">{icon["body"]}</g>'
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{x - width / 2} {y - height / 2} {width} {height}" width="{size}" height="{size}">{body}</svg>'
        )

    @property
    def package(self) -> str:
        return package_name(self.name)

    @property
    def licence(self) -> str:
        """Its identifier of the SPDX list."""
        return self.info["license"]["spdx"]

    @property
    def author(self) -> str:
        return self.info["author"]["name"]

    @property
    def url(self) -> str:
        """Where the author publishes the set."""
        return self.info["author"]["url"]


def package_name(name: str) -> str:
    return f"@iconify-json/{name}"


def read_sets(folder: Path | None = None) -> list[EmojiSet]:
    """The sets, of the packages in a folder; None: of packages fetched with npm.

    Raises:
        DataError: if a package is missing or damaged, or cannot be fetched.
    """
    if folder is None:
        with fetched_packages() as fetched:
            return read_sets(fetched)
    return [read_set(name, folder / tarball(name, version)) for name, version in VERSIONS.items()]


def tarball(name: str, version: str) -> str:
    """What npm calls the file of a package."""
    return f"iconify-json-{name}-{version}.tgz"


@contextmanager
def fetched_packages() -> Iterator[Path]:
    """A temporary folder with the packages (22 MB in all), from the registry that npm is set to. Nothing is installed.

    Raises:
        DataError: if there is no npm, or it fails.
    """
    wanted = [f"{package_name(name)}@{version}" for name, version in VERSIONS.items()]
    remedy = f"on a machine with npm and a network run `npm pack {' '.join(wanted)}`, and name that folder: --packages"
    npm = shutil.which("npm")
    if npm is None:
        raise DataError(f"the packages are fetched with npm, which is not installed. Install Node.js, or {remedy}")
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", "--silent", "--pack-destination", folder, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            problem = next(iter(done.stderr.strip().splitlines()), f"status {done.returncode}")
            raise DataError(f"npm could not fetch the packages ({problem}). Is there a network? Else {remedy}")
        yield Path(folder)


def read_set(name: str, path: Path) -> EmojiSet:
    """The set in a tarball.

    Raises:
        DataError: if the file is missing or is no package of icons.
    """
    if not path.is_file():
        package = f"{package_name(name)}@{VERSIONS[name]}"
        raise DataError(f"{path} is missing; in {path.parent} run `npm pack {package}`, or leave --packages out")
    try:
        with tarfile.open(path) as archive:
            files = {file: _json(archive, file) for file in ("icons", "info", "metadata")}
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it and run npm pack again") from error
    if not files["icons"].get("icons") or not files["info"]:
        raise DataError(f"{path} holds no icons.json and info.json of an icon set; remove it and run npm pack again")
    return EmojiSet(name, **files)


def _json(archive: tarfile.TarFile, file: str) -> dict[str, Any]:
    try:
        member = archive.extractfile(f"package/{file}.json")
    except KeyError:
        member = None  # not every set has categories
    return {} if member is None else json.load(member)
