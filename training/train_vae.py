"""Train a small VAE on an image folder: `python -m training.train_vae --data DIR --output DIR`.

`DIR/train` and `DIR/validation` have one sub-folder per class, as `training.split_images` writes them. Out comes a
diffusers `AutoencoderKL` of about a million parameters, with a report and a picture of reconstructions: eight pixels a
side become one latent. The images are cropped to squares of `--image-size` pixels and all held in memory, so this is
for small images; larger ones are better served by a published VAE.

Loss: mean squared error plus a small KL divergence, both averaged over elements. When trained, the latents' standard
deviation over the training split gives the `scaling_factor` of the saved config, and the reconstructions of the
validation split are measured. The defaults are those of the bundled digits model.

Read `posterior_std_by_channel` in the report: at this KL weight a channel may stay unused (a value near 1, nothing
but the prior's noise, which the decoder ignores). In the run the defaults come from one of the four did.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from training.command_line import not_negative, one_line_errors, positive, positive_number, seed
from training.data.decoding import BadImage, read_image
from training.data.errors import DataError
from training.data.sources import FolderSource
from training.data.vae import check_vae
from training.distributed.interruption import TrainingStopped
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


def build_vae(latent_channels: int = 4, image_size: int = 32) -> AutoencoderKL:
    """A fresh autoencoder of about a million parameters: `(B, 3, H, H)` images, `(B, C, H / 8, H / 8)` latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=image_size,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """`(N, H, W, 3)` images in [0, 1] to a `(N, 3, H, W)` tensor in [-1, 1], which is what the VAE takes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def from_tensor(images: torch.Tensor) -> np.ndarray:
    """The inverse of `to_tensor`."""
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def train(
    vae: AutoencoderKL,
    images: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    generator: torch.Generator,
) -> None:
    """Train `vae` in place on `images` `(N, 3, H, W)` in [-1, 1]; batches are drawn without replacement per epoch.

    Raises:
        TrainingStopped: the loss is not finite.
    """
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=min(100, steps // 10), num_training_steps=steps
    )
    batches: Iterator[torch.Tensor] = iter(())
    vae.train()
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for step in progress:
        batch = next(batches, None)
        if batch is None:
            batches = iter(torch.randperm(len(images), generator=generator).split(batch_size))
            batch = next(batches)
        original = images[batch]
        posterior = vae.encode(original).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample
        error = F.mse_loss(reconstruction, original)
        kl = posterior.kl().sum() / posterior.mean.numel()
        if not torch.isfinite(error + kl):
            raise TrainingStopped(f"the loss of step {step + 1} is not finite; lower --learning-rate and run again")
        (error + kl_weight * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(mse=f"{error.item():.5f}", kl=f"{kl.item():.3f}", refresh=False)
    vae.eval()


@torch.no_grad()
def latent_statistics(vae: AutoencoderKL, images: torch.Tensor) -> dict[str, Any]:
    """Mean and standard deviation of posterior samples, overall and by channel, and the posterior's own part in it."""
    posterior = vae.encode(images).latent_dist
    sample = posterior.mean + posterior.std * torch.randn(
        posterior.mean.shape, generator=torch.Generator().manual_seed(0)
    )
    return {
        "std": sample.std().item(),
        "mean": sample.mean().item(),
        "std_by_channel": [round(value, 3) for value in sample.std(dim=(0, 2, 3)).tolist()],
        "mean_by_channel": [round(value, 3) for value in sample.mean(dim=(0, 2, 3)).tolist()],
        "posterior_std_by_channel": [round(value, 3) for value in posterior.std.mean(dim=(0, 2, 3)).tolist()],
    }


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, images: np.ndarray) -> np.ndarray:
    """Encode and decode (through the posterior's mean) `(N, H, W, 3)` images in [0, 1]."""
    return from_tensor(vae.decode(vae.encode(to_tensor(images)).latent_dist.mean).sample)


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
    parser.add_argument("--steps", type=positive, default=3500)
    parser.add_argument("--batch-size", type=positive, default=32)
    parser.add_argument("--learning-rate", type=positive_number, default=2e-3)
    parser.add_argument("--kl-weight", type=not_negative, default=3e-3)
    parser.add_argument("--latent-channels", type=positive, default=4)
    parser.add_argument("--seed", type=seed, default=0)
    return parser.parse_args(arguments)


def train_and_report(options: argparse.Namespace, judge: Judge | None = None) -> dict[str, Any]:
    """Write the VAE, report.json and preview.png to `options.output`; returns the report.

    Raises:
        ConfigError, DataError: if the size does not fit the VAE, or images are missing or cannot be read.
        TrainingStopped: the loss is not finite.
        OSError: the output exists and is not an empty folder, or cannot be written.
    """
    torch.manual_seed(options.seed)
    vae = build_vae(options.latent_channels, options.image_size)
    check_vae(vae, options.image_size)
    generator = torch.Generator().manual_seed(options.seed)
    with new_folder(options.output) as folder:
        images, unseen = (load_images(options.data / split, options.image_size) for split in ("train", "validation"))
        started = time.perf_counter()
        settings = options.steps, options.batch_size, options.learning_rate, options.kl_weight
        train(vae, to_tensor(images), *settings, generator)
        seconds = time.perf_counter() - started
        latents = latent_statistics(vae, to_tensor(images))
        vae.register_to_config(scaling_factor=round(1 / latents["std"], 4))
        reconstructions = reconstruct(vae, unseen)
        report: dict[str, Any] = {"psnr_db": peak_signal_to_noise(unseen, reconstructions)}
        report |= {} if judge is None else judge(unseen, reconstructions)
        report |= {
            "latents": latents,
            "seconds": seconds,
            "parameters": vae.num_parameters(),
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
            },
        }
        vae.save_pretrained(folder)
        Image.fromarray(preview(unseen, reconstructions)).save(folder / "preview.png")
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def main(
    arguments: Sequence[str] | None = None,
    program: str = "training.train_vae",
    judge: Callable[[argparse.Namespace], Judge] | None = None,
) -> None:
    """Command line entry point; `judge` adds to the report what can be said of a certain kind of images."""
    options = parse(arguments, program)
    with one_line_errors(program, TrainingStopped):
        refuse_existing(options.output)
        report = train_and_report(options, None if judge is None else judge(options))
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
