"""Train the small VAE of the bundled digits model.

    python -m training.digits.train_vae --data data/digits --output runs/digits-vae

A diffusers `AutoencoderKL` that turns 32x32 images into 4x4 latents. The data have 64 numbers an image, and so have
the latents of 4 channels. Loss: mean squared error plus a small KL divergence, both averaged over elements. When
trained, the latents' standard deviation over the training split gives the `scaling_factor` of the saved config, and
the reconstructions of the validation split are measured.

Read `posterior_std_by_channel` in the report: at this KL weight a channel may stay unused (a value near 1, nothing
but the prior's noise, which the decoder ignores). In the run the defaults come from one of the four did.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from PIL import Image
from tqdm import tqdm

from training.digits.quality import fit_recogniser, load_split, pooled_pixels, recognition, within_class_variance
from transdiff_pipelines.files import new_folder


def build_vae(latent_channels: int = 4) -> AutoencoderKL:
    """A fresh autoencoder of about a million parameters: `(B, 3, 32, 32)` images, `(B, 4, 4, 4)` latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=latent_channels,
        norm_num_groups=8,
        sample_size=32,
        mid_block_add_attention=False,
    )


def to_tensor(images: np.ndarray) -> torch.Tensor:
    """`(N, H, W, 3)` images in [0, 1] to a `(N, 3, H, W)` tensor in [-1, 1], which is what the VAE takes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() * 2 - 1


def train(
    vae: AutoencoderKL,
    images: torch.Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    kl_weight: float,
    generator: torch.Generator,
) -> None:
    """Train `vae` in place on `images` `(N, 3, H, W)` in [-1, 1]; batches are drawn without replacement per epoch."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(
        optimizer, num_warmup_steps=min(100, steps // 10), num_training_steps=steps
    )
    batches: Iterator[torch.Tensor] = iter(())
    vae.train()
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for _ in progress:
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
    decoded = vae.decode(vae.encode(to_tensor(images)).latent_dist.mean).sample
    return (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def measure(vae: AutoencoderKL, data: str | os.PathLike) -> tuple[dict[str, Any], np.ndarray]:
    """How well the validation split is reconstructed: the numbers, and a picture of some reconstructions."""
    train_images, train_labels = load_split(data, "train")
    images, labels = load_split(data, "validation")
    reconstructions = reconstruct(vae, images)
    recogniser = fit_recogniser(pooled_pixels(train_images), train_labels)
    real, rebuilt = pooled_pixels(images), pooled_pixels(reconstructions)
    mean_squared_error = float(np.square(images - reconstructions).mean())
    report = {
        "psnr_db": -10 * math.log10(mean_squared_error),
        "recognition_real": recognition(recogniser, real, labels),
        "recognition_reconstructed": recognition(recogniser, rebuilt, labels),
        "within_class_variance_ratio": within_class_variance(rebuilt, labels) / within_class_variance(real, labels),
    }
    return report, preview(images, reconstructions)


def preview(images: np.ndarray, reconstructions: np.ndarray, count: int = 16, rows: int = 4) -> np.ndarray:
    """A uint8 picture: rows of `count` originals, each above the row of their reconstructions."""
    chosen = np.linspace(0, len(images) - 1, min(count * rows, len(images))).astype(int)
    lines = []
    for row in np.array_split(chosen, rows):
        for source in (images, reconstructions):
            lines.append(np.concatenate(list(source[row]), axis=1))
    width = min(line.shape[1] for line in lines)
    return np.round(np.concatenate([line[:, :width] for line in lines]) * 255).astype(np.uint8)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder written by training.digits.export")
    parser.add_argument("--output", required=True, help="folder to create")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--kl-weight", type=float, default=3e-3)
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    images, _ = load_split(options.data, "train")
    torch.manual_seed(options.seed)
    vae = build_vae(options.latent_channels)
    generator = torch.Generator().manual_seed(options.seed)
    with new_folder(options.output) as folder:
        started = time.perf_counter()
        train(
            vae,
            to_tensor(images),
            options.steps,
            options.batch_size,
            options.learning_rate,
            options.kl_weight,
            generator,
        )
        seconds = time.perf_counter() - started
        latents = latent_statistics(vae, to_tensor(images))
        vae.register_to_config(scaling_factor=round(1 / latents["std"], 4))
        report, picture = measure(vae, options.data)
        vae.save_pretrained(folder)
        Image.fromarray(picture).save(folder / "preview.png")
        report |= {
            "latents": latents,
            "seconds": seconds,
            "parameters": vae.num_parameters(),
            "options": vars(options),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
