"""The published models: sizes, sampling settings and results, in one table.

The converter, the training configurations, evaluation and the model cards read their numbers here and nowhere else.
"""

from dataclasses import dataclass
from typing import Any


ORIGINAL_REPOSITORY = "zhendch/Transdiff"
"""The Hub repository of the authors' checkpoints: one folder per model, and `vae`."""

ORIGINAL_FILENAME = "checkpoint-last.pth"
ORIGINAL_VAE_FOLDER = "vae"

VAE_SCALING_FACTOR = 0.2325
"""Latents are the VAE's posterior samples times this."""

VAE_DOWNSAMPLE_FACTOR = 16

DEFAULT_NUM_INFERENCE_STEPS = 100
"""Denoising steps of a checkpoint that recommends none, as in the paper."""


@dataclass(frozen=True)
class ModelSize:
    """One column of the paper's scaling: encoder and decoder share width and heads."""

    name: str
    width: int
    num_attention_heads: int
    encoder_layers: int
    decoder_layers: int

    @property
    def attention_head_dim(self) -> int:
        return self.width // self.num_attention_heads


@dataclass(frozen=True)
class PublishedModel:
    """A released checkpoint with the settings and the ImageNet results published for it.

    `folder` is its name in the authors' repository, `patch_size` the autoregressive patch size p (1: one step; 2:
    multi-reference autoregression, "MRAR", over p * p = 4 images) and `resolution` the image side in pixels. FID-50K,
    Inception Score, precision and recall are those with guidance at the settings given here; `None` where neither
    the paper nor the authors' repository tells. `seconds_per_image` is the paper's, on an A800-class GPU.
    """

    folder: str
    size: ModelSize
    num_parameters: int
    guidance_scale: float
    drift_scale: float
    diffusion_scale: float
    fid: float
    inception_score: float
    precision: float | None = None
    recall: float | None = None
    fid_without_guidance: float | None = None
    inception_score_without_guidance: float | None = None
    seconds_per_image: float | None = None
    patch_size: int = 1
    resolution: int = 256
    num_classes: int = 1000
    note: str = ""

    @property
    def num_images(self) -> int:
        """Images in one autoregressive sequence."""
        return self.patch_size**2

    @property
    def latent_size(self) -> int:
        """Side of the latent grid the decoder denoises."""
        return self.resolution // VAE_DOWNSAMPLE_FACTOR

    def encoder_config(self) -> dict[str, Any]:
        """The constructor arguments of this model's `ARConditionEncoder`."""
        return encoder_config(self.size, patch_size=self.patch_size, num_classes=self.num_classes)

    def transformer_config(self) -> dict[str, Any]:
        """The constructor arguments of this model's `TransDiffTransformer2DModel`."""
        return transformer_config(self.size, sample_size=self.latent_size)


def encoder_config(size: ModelSize, patch_size: int = 1, num_classes: int = 1000) -> dict[str, Any]:
    """`ARConditionEncoder` arguments for a size; its grid is 16 x 16 in every published model, at 512 px too."""
    return {
        "num_classes": num_classes,
        "sample_size": 16,
        "in_channels": 16,
        "patch_size": patch_size,
        "num_class_tokens": 64,
        "num_layers": size.encoder_layers,
        "num_attention_heads": size.num_attention_heads,
        "attention_head_dim": size.attention_head_dim,
    }


def transformer_config(size: ModelSize, sample_size: int = 16) -> dict[str, Any]:
    """`TransDiffTransformer2DModel` arguments for a size; `sample_size` is 16 at 256 px and 32 at 512 px."""
    return {
        "sample_size": sample_size,
        "in_channels": 16,
        "patch_size": 1,
        "num_layers": size.decoder_layers,
        "num_attention_heads": size.num_attention_heads,
        "attention_head_dim": size.attention_head_dim,
        "cross_attention_dim": size.width,
    }


# The authors' code counts 12, 16 and 20 layers; its autoregressive encoder has twice as many.
SIZES: dict[str, ModelSize] = {
    size.name: size
    for size in (
        ModelSize("B", width=768, num_attention_heads=12, encoder_layers=24, decoder_layers=12),
        ModelSize("L", width=1024, num_attention_heads=16, encoder_layers=32, decoder_layers=16),
        ModelSize("H", width=1280, num_attention_heads=16, encoder_layers=40, decoder_layers=20),
    )
}

# fmt: off
PUBLISHED: dict[str, PublishedModel] = {
    model.folder: model
    for model in (
        PublishedModel(
            "transdiff_b", SIZES["B"], num_parameters=289_959_184,
            guidance_scale=1.30, drift_scale=0.87, diffusion_scale=0.91,
            fid=2.47, inception_score=244.2, precision=0.81, recall=0.56,
            fid_without_guidance=5.09, inception_score_without_guidance=153.5, seconds_per_image=0.1,
        ),
        PublishedModel(
            "transdiff_b_mrar", SIZES["B"], patch_size=2, num_parameters=290_044_432,
            guidance_scale=1.30, drift_scale=0.87, diffusion_scale=0.91,
            fid=2.25, inception_score=244.3, precision=0.80, recall=0.57,
            fid_without_guidance=5.56, inception_score_without_guidance=148.1, seconds_per_image=0.4,
        ),
        PublishedModel(
            "transdiff_l", SIZES["L"], num_parameters=682_519_568,
            guidance_scale=1.30, drift_scale=0.89, diffusion_scale=0.95,
            fid=1.69, inception_score=282.0, precision=0.81, recall=0.60,
            fid_without_guidance=3.05, inception_score_without_guidance=185.7, seconds_per_image=0.2,
        ),
        PublishedModel(
            "transdiff_l_mrar", SIZES["L"], patch_size=2, num_parameters=682_633_232,
            guidance_scale=1.30, drift_scale=0.925, diffusion_scale=0.95,
            fid=1.49, inception_score=282.2, precision=0.82, recall=0.60,
            fid_without_guidance=2.95, inception_score_without_guidance=192.7, seconds_per_image=0.8,
        ),
        PublishedModel(
            "transdiff_h", SIZES["H"], num_parameters=1_327_891_216,
            guidance_scale=1.23, drift_scale=0.87, diffusion_scale=0.93,
            fid=1.61, inception_score=293.4, precision=0.81, recall=0.61,
            fid_without_guidance=2.23, inception_score_without_guidance=210.1, seconds_per_image=0.4,
        ),
        PublishedModel(
            "transdiff_h_mrar", SIZES["H"], patch_size=2, num_parameters=1_328_033_296,
            guidance_scale=1.28, drift_scale=0.87, diffusion_scale=0.91,
            fid=1.42, inception_score=301.2, precision=0.81, recall=0.62,
            fid_without_guidance=2.50, inception_score_without_guidance=220.3, seconds_per_image=1.6,
        ),
        PublishedModel(
            "transdiff_l_512", SIZES["L"], resolution=512, num_parameters=683_306_000,
            guidance_scale=1.30, drift_scale=0.87, diffusion_scale=0.87,
            fid=2.51, inception_score=286.6,
            note="The authors' repository gives this Inception Score; the paper's Table 5 has 276.6, labelled MRAR.",
        ),
    )
}
# fmt: on


def published_model(name: str) -> PublishedModel:
    """Look a published model up by its folder name.

    Raises:
        ValueError: no published model is called `name`.
    """
    if name not in PUBLISHED:
        raise ValueError(f"{name!r} is not a published model; choose one of {', '.join(PUBLISHED)}")
    return PUBLISHED[name]


def size_of_width(width: int) -> ModelSize | None:
    """The published size with this width, or None."""
    return next((size for size in SIZES.values() if size.width == width), None)
