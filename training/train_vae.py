"""Train a small VAE on an image folder: `python -m training.train_vae --data DIR --output DIR`.

`DIR/train` and `DIR/validation` have one sub-folder per class, as `training.split_images` writes them. Out comes a
diffusers `AutoencoderKL` of about a million parameters, with a report and a picture of reconstructions: eight pixels a
side become one latent. The images are cropped to squares of `--image-size` pixels and all held in memory, so this is
for small images; larger ones are better served by a published VAE.

Loss: the error of the reconstruction plus a small KL divergence, both averaged over elements. When trained, the
latents' standard deviation over the training split gives the `scaling_factor` of the saved config, and the
reconstructions of the validation split are measured. The defaults are those of the bundled digits model.

`--decoder-of VAE` trains the decoder of a finished VAE further and leaves the encoder alone, so that its latents, and
what was trained on them, stay what they are. The sizes are those of that VAE.

A run that is stopped goes on when its command is repeated: its state is saved in `OUTPUT.unfinished`.

Read `posterior_std_by_channel` in the report: a channel may stay unused (a value near 1, nothing but the prior's
noise, which the decoder ignores). In the run the defaults come from one of the four did.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from training.command_line import not_negative, one_line_errors, positive, positive_number, seed
from training.data.decoding import BadImage, read_image
from training.data.errors import DataError
from training.data.sources import FolderSource
from training.data.vae import check_vae, load_vae
from training.distributed.interruption import TrainingInterrupted, TrainingStopped
from training.model.autoencoder import (
    LATENT_CHANNELS,
    LOSSES,
    WIDTHS,
    VAESettings,
    VAETrainer,
    build_vae,
    from_tensor,
    latent_statistics,
    reconstruct,
    to_tensor,
)
from training.settings.config import ConfigError
from transdiff_pipelines.devices import best_device
from transdiff_pipelines.files import home_path, new_folder, refuse_existing


# Images `(N, H, W, 3)` in [0, 1], before and after the VAE, to further entries of the report.
Judge = Callable[[np.ndarray, np.ndarray], dict[str, Any]]


def load_images(folder: Path, size: int) -> np.ndarray:
    """The images of a folder of class folders, `(N, size, size, 3)` in [0, 1], in the order of classes and names.

    Raises:
        DataError: if there are none, or if one cannot be read.
    """
    source = FolderSource(folder)
    images = []
    for index in range(source.length):
        example = source.example(index)
        try:
            images.append(read_image(example.load(), size, channels=3))
        except BadImage as error:
            raise DataError(f"{folder / example.name} cannot be read ({error}); remove it") from None
    return from_tensor(torch.stack(images))


def peak_signal_to_noise(images: np.ndarray, reconstructions: np.ndarray) -> float:
    """In decibels, of images in [0, 1]."""
    return -10 * math.log10(float(np.square(images - reconstructions).mean()))


def preview(images: np.ndarray, reconstructions: np.ndarray, count: int = 16, rows: int = 4) -> np.ndarray:
    """A uint8 picture: rows of `count` originals, each above the row of their reconstructions."""
    chosen = np.linspace(0, len(images) - 1, min(count * rows, len(images))).astype(int)
    lines = []
    for row in np.array_split(chosen, min(rows, len(chosen))):
        for source in (images, reconstructions):
            lines.append(np.concatenate(list(source[row]), axis=1))
    width = min(line.shape[1] for line in lines)
    return np.round(np.concatenate([line[:, :width] for line in lines]) * 255).astype(np.uint8)


def parse(arguments: Sequence[str] | None, program: str) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog=program, description=__doc__.splitlines()[0].partition(":")[0])
    parser.add_argument("--data", type=home_path, required=True, help="folder with train/ and validation/")
    parser.add_argument("--output", type=home_path, required=True, help="folder to create")
    parser.add_argument("--image-size", type=positive, default=32, help="side in pixels, a multiple of 8")
    parser.add_argument(
        "--decoder-of",
        metavar="VAE",
        help="folder or Hub repository of a finished VAE: train its decoder further, the encoder stays",
    )
    parser.add_argument("--latent-channels", type=positive, help=f"(default: {LATENT_CHANNELS})")
    parser.add_argument(
        "--widths",
        type=positive,
        nargs="+",
        metavar="N",
        help="channels at full resolution and after each halving, multiples of 8; four of them: a latent of 8 pixels "
        f"(default: {' '.join(map(str, WIDTHS))})",
    )
    defaults = VAESettings()
    parser.add_argument("--steps", type=positive, default=defaults.steps)
    parser.add_argument("--batch-size", type=positive, default=defaults.batch_size)
    parser.add_argument("--learning-rate", type=positive_number, default=defaults.learning_rate)
    parser.add_argument("--kl-weight", type=not_negative, default=defaults.kl_weight)
    parser.add_argument(
        "--loss", choices=LOSSES, default=defaults.loss, help="of the reconstruction; l1 keeps edges sharper"
    )
    parser.add_argument("--mirror", action="store_true", help="mirror half of the images")
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute in bfloat16: faster where the processor has it"
    )
    parser.add_argument("--checkpoint-every", type=positive, default=500, metavar="STEPS")
    parser.add_argument("--seed", type=seed, default=0)
    return parser.parse_args(arguments)


def unfinished(output: Path) -> Path:
    """The file beside the output folder that holds the state of a run on its way."""
    return output.with_name(f"{output.name}.unfinished")


def starting_vae(options: argparse.Namespace) -> AutoencoderKL:
    """A fresh VAE, or the one whose decoder is trained further.

    Raises:
        ConfigError, DataError: sizes that do not work, or that are given for a VAE which has its own; no such VAE.
    """
    if options.decoder_of is None:
        widths = options.widths or WIDTHS
        check_widths(widths)
        return build_vae(options.latent_channels or LATENT_CHANNELS, options.image_size, widths)
    given = [f"--{name.replace('_', '-')}" for name in ("latent_channels", "widths") if getattr(options, name)]
    if given:
        raise ConfigError(f"{' and '.join(given)}: the VAE of --decoder-of has its own sizes; leave it out")
    return load_vae(options.decoder_of, "--decoder-of")


def check_widths(widths: Sequence[int]) -> None:
    if len(widths) < 2 or any(width % 8 for width in widths):
        given = " ".join(map(str, widths))
        raise ConfigError(
            f"--widths {given}: expected at least two multiples of 8, such as {' '.join(map(str, WIDTHS))}"
        )


def train_and_report(options: argparse.Namespace, judge: Judge | None = None) -> dict[str, Any]:
    """Write the VAE, report.json and preview.png to `options.output`; returns the report.

    Raises:
        ConfigError, DataError: if the size does not fit the VAE, or images are missing or cannot be read.
        TrainingStopped: the loss is not finite.
        TrainingInterrupted: a signal asked to stop; the same options go on from there.
        OSError: the output exists and is not an empty folder, or cannot be written.
    """
    torch.manual_seed(options.seed)
    vae = starting_vae(options)
    check_vae(vae, options.image_size)
    refuse_existing(options.output)
    images, unseen = (load_images(options.data / split, options.image_size) for split in ("train", "validation"))
    named = {field.name: getattr(options, field.name) for field in fields(VAESettings) if hasattr(options, field.name)}
    named["decoder_only"] = options.decoder_of is not None
    started = time.perf_counter()
    trainer = VAETrainer(vae.to(best_device()), to_tensor(images), VAESettings(**named), options.seed)
    trainer.run(unfinished(options.output), options.checkpoint_every)
    seconds = time.perf_counter() - started
    latents = latent_statistics(vae, trainer.images)
    if options.decoder_of is None:  # else latents keep their scale
        vae.register_to_config(scaling_factor=round(1 / latents["std"], 4))
    reconstructions = reconstruct(vae, unseen)
    report: dict[str, Any] = {"psnr_db": peak_signal_to_noise(unseen, reconstructions)}
    report |= {} if judge is None else judge(unseen, reconstructions)
    report |= {
        "latents": latents,
        "seconds": seconds,
        "parameters": vae.num_parameters(),
        "options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    with new_folder(options.output) as folder:
        vae.save_pretrained(folder)
        Image.fromarray(preview(unseen, reconstructions)).save(folder / "preview.png")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    unfinished(options.output).unlink(missing_ok=True)
    return report


def main(
    arguments: Sequence[str] | None = None,
    program: str = "training.train_vae",
    judge: Callable[[argparse.Namespace], Judge] | None = None,
) -> None:
    """Command line entry point; `judge` adds to the report what can be said of a certain kind of images."""
    options = parse(arguments, program)
    try:
        with one_line_errors(program, TrainingStopped):
            refuse_existing(options.output)
            report = train_and_report(options, None if judge is None else judge(options))
            print(json.dumps(report, indent=2))
    except (TrainingInterrupted, KeyboardInterrupt) as error:
        print(f"{program}: {str(error) or 'interrupted'}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
