"""Render six sets of emoji as image folders: `DIR/{train,validation,test}/CLASS/SET.png`.

The drawings are openly licensed SVGs in npm packages (22 MB in all), which are fetched where no folder with them is
named. Beside the pictures stand `classes.txt`, the names of the classes, and `sources.csv`, with the licence, author
and origin of every picture. `training/emoji/classes.py` says what is held out for validation and test, and why.

    python -m training.emoji.render --output datasets/emoji
    python -m training.emoji.render --output datasets/emoji_200 --classes training/emoji/classes_200.txt
"""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageColor
from tqdm import tqdm

from training.command_line import one_line_errors, positive
from training.data.errors import DataError
from training.data.labels import natural_key
from training.data.splits import SPLITS
from transdiff_pipelines.files import home_path, new_folder, refuse_existing

from .classes import category, class_name, default_classes, held_out, listed_classes
from .packages import VERSIONS, EmojiSet, read_sets


class Picture(NamedTuple):
    """One row of sources.csv."""

    file: str
    class_name: str
    category: str
    set: str
    package: str
    version: str
    licence: str
    author: str
    url: str


def render(
    output: str | os.PathLike[str],
    size: int = 64,
    packages: Path | None = None,
    classes: Path | None = None,
    background: str = "white",
) -> Counter[str]:
    """Write the image folders and return the number of pictures in each split.

    Args:
        output: the folder to make.
        size: of the square pictures, in pixels.
        packages: folder of the packages' tarballs; None: they are fetched.
        classes: a file with names of classes, one a line; None: all names that the six sets share.
        background: colour that the drawings stand on, a name or #rrggbb.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
        DataError: if packages are missing, a class is unknown, or a drawing cannot be rendered.
    """
    refuse_existing(output)
    to_png = renderer()
    colour = parse_colour(background)
    sets = read_sets(packages)
    names = default_classes(sets) if classes is None else listed_classes(classes, sets)
    held = held_out(sets)
    pictures: list[Picture] = []
    drawn: dict[bytes, str] = {}
    with new_folder(output) as folder:
        for name in tqdm(names, desc="rendering", unit="class"):
            for emoji in (emoji for emoji in sets if name in emoji.names):
                split = held[name].split if emoji.name == held[name].set else "train"
                picture = described(name, emoji, split, sets)
                image = on_background(to_png(emoji.svg(name, size)), colour)
                refuse_twins(image, picture, drawn)
                path = folder / picture.file
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
                pictures.append(picture)
        write_tables(folder, names, pictures)
    return Counter(picture.file.split("/")[0] for picture in pictures)


def renderer() -> Callable[[str], bytes]:
    """What makes PNG files of SVGs.

    Raises:
        DataError: if resvg is not installed.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise DataError(
            "resvg-py renders the drawings and is not installed; run: pip install 'resvg-py>=0.5', or install the "
            "train extra"
        ) from None
    # There is no text in the drawings; what fonts the machine has is of no concern to them.
    return lambda svg: svg_to_bytes(svg_string=svg, skip_system_fonts=True)


def parse_colour(text: str) -> tuple[int, int, int]:
    """Red, green and blue in 0..255 of a colour's name or #rrggbb.

    Raises:
        DataError: if it is no colour, or one that one can see through.
    """
    try:
        colour = ImageColor.getrgb(text)
        if len(colour) == 3:
            return colour
    except ValueError:
        pass
    raise DataError(f"background {text!r} is no opaque colour; expected a name such as white, or #rrggbb")


def on_background(png: bytes, colour: tuple[int, int, int]) -> Image.Image:
    """An RGB picture of a PNG with transparency, on a colour."""
    drawing = Image.open(io.BytesIO(png)).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", drawing.size, colour), drawing).convert("RGB")


def refuse_twins(image: Image.Image, picture: Picture, drawn: dict[bytes, str]) -> None:
    """Check that no other class has this very picture, and note it in `drawn`.

    Raises:
        DataError: if one has: no model could tell them apart.
    """
    other = drawn.setdefault(image.tobytes(), picture.class_name)
    if other != picture.class_name:
        raise DataError(
            f"classes {other!r} and {picture.class_name!r} have the same picture in {picture.set}; take one of them"
        )


def described(name: str, emoji: EmojiSet, split: str, sets: Sequence[EmojiSet]) -> Picture:
    """The row of a picture in sources.csv."""
    label = class_name(name)
    return Picture(
        file=f"{split}/{label}/{emoji.name}.png",
        class_name=label,
        category=category(name, sets),
        set=emoji.name,
        package=emoji.package,
        version=VERSIONS[emoji.name],
        licence=emoji.licence,
        author=emoji.author,
        url=emoji.url,
    )


def write_tables(folder: Path, names: Sequence[str], pictures: Sequence[Picture]) -> None:
    """Write classes.txt, in the order of the labels that training gives them, and sources.csv."""
    lines = [label + "\n" for label in sorted(map(class_name, names), key=natural_key)]
    (folder / "classes.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
    with (folder / "sources.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow("class" if field == "class_name" else field for field in Picture._fields)
        table.writerows(sorted(pictures))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="training.emoji.render", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=home_path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--size", type=positive, default=64, help="of the square pictures, in pixels (default: 64)")
    parser.add_argument("--packages", type=home_path, help="folder of the npm packages (default: they are fetched)")
    parser.add_argument("--classes", type=home_path, help="list of classes, one a line (default: all shared names)")
    parser.add_argument("--background", default="white", help="colour, a name or #rrggbb (default: white)")
    options = parser.parse_args(arguments)
    with one_line_errors("training.emoji.render"):
        counts = render(options.output, options.size, options.packages, options.classes, options.background)
        print(f"{options.output}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))


if __name__ == "__main__":
    main()
