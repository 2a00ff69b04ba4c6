"""Divide an image folder in three: `python -m training.split_images --images DIR --output DIR`.

`DIR/CLASS/...` becomes `OUTPUT/{train,validation,test}/CLASS/...` with 70, 10 and 20% of each class's images, always
the same ones for a seed: to train on, to tune settings on, and to report on. The files are linked where the file
system can, else copied.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from training.command_line import one_line_errors, seed
from training.data.errors import DataError
from training.data.folders import check_outside
from training.data.sources import FolderSource
from training.data.splits import split_indices
from transdiff_pipelines.files import home_path, new_folder


def split_images(images: Path, output: Path, seed: int = 0) -> dict[str, int]:
    """Write the three folders and return the number of images in each.

    Raises:
        DataError: if there are no class folders with images, or a class has too few of them; if `output` lies inside
            `images`.
        FileExistsError: `output` exists and is not an empty folder.
    """
    check_outside(output, images, "--output")
    source = FolderSource(images)
    examples = [source.example(index) for index in range(source.length)]
    labels = np.array([example.label for example in examples])
    counts = np.bincount(labels)
    try:
        splits = split_indices(labels, seed)
    except ValueError as error:
        name, count = source.classes[int(counts.argmin())], int(counts.min())
        raise DataError(
            f"{images} cannot be divided in three ({error}): its smallest class, {name}, has {count} image(s), and "
            "ten of each class are enough. Add some, or leave the class out"
        ) from None
    with new_folder(output) as folder:
        for name, indices in splits.items():
            for index in indices:
                file = examples[index].name
                target = folder / name / file
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy((images / file).resolve(), target)
    return {name: len(indices) for name, indices in splits.items()}


def link_or_copy(path: Path, target: Path) -> None:
    """Give a file a second name, or make a second file where another file system is meant or links are unknown."""
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(prog="training.split_images", description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=home_path, required=True, help="folder with one sub-folder per class")
    parser.add_argument("--output", type=home_path, required=True, help="folder to create; must not exist or be empty")
    parser.add_argument("--seed", type=seed, default=0)
    options = parser.parse_args(arguments)
    with one_line_errors("training.split_images"):
        counts = split_images(options.images, options.output, options.seed)
        print(f"{options.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
