"""Write scikit-learn's bundled digits as an image folder: `DIR/{train,validation,test}/{0..9}/NNNN.png`.

The data are 1,797 real handwritten digits (8x8 pixels, 0..16). They come with scikit-learn, so nothing is
downloaded. Every image is enlarged to 32x32 grey pixels such that the mean of each 4x4 block is the original
pixel: pooling an image gives the original back, and measures taken on pooled pixels are measures on the data.

    python -m training.digits.export --output data/digits
"""

import argparse
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from training.command_line import one_line_errors
from training.data.splits import split_indices
from transdiff_pipelines.files import home_path, new_folder


DATA_MAXIMUM = 16  # load_digits counts inked pixels of a 4x4 block of a bitmap
FACTOR = 4


def enlarge(images: np.ndarray, iterations: int = 40) -> np.ndarray:
    """Enlarge `(N, 8, 8)` images in 0..16 to smooth `(N, 32, 32)` uint8 images with nearly the same 4x4 block means.

    Iterative back-projection: the bicubic enlargement's block means miss the original by a little, so what is
    missing is added to the small image and enlarged again. Clipping to 0..255 is part of the loop.
    """
    side = images.shape[-1]
    # Bicubic resizing is linear and works on columns and rows alike: resizing the identity gives its matrix.
    identity = Image.fromarray(np.eye(side, dtype=np.float32))
    bicubic = np.asarray(identity.resize((side, FACTOR * side), Image.Resampling.BICUBIC), dtype=np.float64)
    target = images * (255 / DATA_MAXIMUM)
    source = target.copy()
    for _ in range(iterations):
        large = np.clip(bicubic @ source @ bicubic.T, 0, 255)
        source += target - block_means(large)
    return np.round(large).astype(np.uint8)


def block_means(images: np.ndarray, factor: int = FACTOR) -> np.ndarray:
    """Mean of each `factor x factor` block: `(..., H, W)` to `(..., H / factor, W / factor)`."""
    *batch, height, width = images.shape
    return images.reshape(*batch, height // factor, factor, width // factor, factor).mean(axis=(-3, -1))


def export(output: str | os.PathLike[str]) -> dict[str, int]:
    """Write the image folder and return the number of images in each split.

    `NNNN` in a file name is the image's index in `load_digits()`, so every file can be traced.

    Raises:
        FileExistsError: `output` exists and is not an empty folder.
    """
    with new_folder(output) as folder:
        digits = load_digits()
        splits = split_indices(digits.target)
        images = enlarge(digits.images)
        for name, indices in splits.items():
            for index in indices:
                path = folder / name / str(digits.target[index]) / f"{index:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).save(path)
    return {name: len(indices) for name, indices in splits.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=home_path, required=True, help="folder to create; must not exist or be empty")
    options = parser.parse_args(arguments)
    with one_line_errors("training.digits.export"):
        counts = export(options.output)
        print(f"{options.output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
