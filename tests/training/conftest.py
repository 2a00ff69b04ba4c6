"""A tiny data set, VAE and cache, shared by the training tests."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image

from tests.tiny import tiny_encoder, tiny_pipeline, tiny_transformer
from training.cache_latents import cache_latents
from training.data.latent_cache import LatentCache
from training.settings.config import DataConfig, TrainConfig, build


CLASS_SIZES = {"1": 5, "2": 9, "10": 3}  # natural order: 1, 2, 10


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps one precision and one device per process; each test begins without."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of three classes, grey noise, 16 x 16 or not quite square."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for name, count in CLASS_SIZES.items():
        (root / name).mkdir()
        for index in range(count):
            pixels = random.integers(0, 256, (16, 16 + index), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE of stride 4 with 4 latent channels, random weights, as a folder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.5,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_config(images: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """The data section for the tiny data set, mirrored and cut into several shards."""
    return DataConfig(
        images=str(images),
        vae=str(vae),
        cache=str(tmp_path_factory.mktemp("caches") / "latents"),
        image_size=16,
        shard_size=7,
        encode_batch_size=3,
        batch_size=4,
    )


@pytest.fixture(scope="session")
def cache(data_config: DataConfig) -> LatentCache:
    return cache_latents(data_config)


@pytest.fixture
def make_config(cache: LatentCache, data_config: DataConfig, tmp_path: Path):
    """Builds a run's configuration on the tiny data: `make_config("name", **{"schedule.steps": 3})`."""

    def make(output: str = "run", **changes) -> TrainConfig:
        tree = {
            "output": str(tmp_path / output),
            "model": {
                "encoder_layers": 1,
                "decoder_layers": 1,
                "num_attention_heads": 2,
                "attention_head_dim": 8,
                "num_class_tokens": 2,
            },
            "data": {"vae": data_config.vae, "cache": data_config.cache, "image_size": 16, "batch_size": 4},
            "loss": {"diffusion_batch_mul": 2},
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"steps": 4},
            "checkpoints": {"every": 2},
            "preview": {"every": None},
            "log_every": 1,
        }
        for key, value in changes.items():
            *sections, last = key.split(".")
            section = tree
            for name in sections:
                section = section.setdefault(name, {})
            section[last] = value
        return build(TrainConfig, tree)

    return make


@pytest.fixture
def flow_map_config(make_config, vae: Path, tmp_path: Path):
    """A run's configuration with a teacher of the data's classes: `flow_map_config("name", patch_size, **changes)`."""

    def make(output: str = "run", patch_size: int = 2, **changes):
        folder = tmp_path / f"teacher-{patch_size}"
        if not folder.exists():
            parts = {"condition_encoder": tiny_encoder(patch_size), "transformer": tiny_transformer(num_layers=2)}
            pipe = tiny_pipeline(vae=AutoencoderKL.from_pretrained(vae), **parts)
            pipe.resize_class_embeddings(dict(enumerate(CLASS_SIZES)))
            pipe.save_pretrained(folder)
        sizes = ("encoder_layers", "decoder_layers", "num_attention_heads", "attention_head_dim", "num_class_tokens")
        settings = dict.fromkeys((f"model.{name}" for name in sizes), None) | {
            "model.start_from": str(folder),
            "model.patch_size": patch_size,
            "model.dropout": 0.0,
            "model.frozen": ["condition_encoder"],
            "model.flow_map_layers": 1,
            "loss.kind": "flow_map",
            "loss.teacher_steps": 4,
            "loss.label_dropout": 0.0,
        }
        return make_config(output, **(settings | changes))

    return make
