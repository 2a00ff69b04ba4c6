"""A run goes on where its data, VAE and pipeline lie elsewhere or are written otherwise, and not with other ones."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from test_train import train

from training.cache_latents import cache_latents
from training.outputs.checkpoints import CheckpointError
from training.settings.config import TrainConfig, build, to_dict
from training.train import Trainer


@pytest.fixture
def run(make_config, data_config, vae, tmp_path, monkeypatch) -> TrainConfig:
    """A finished run of two steps whose VAE, cache and origin lie in the current folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    train(make_config("origin", **{"schedule.steps": 2}))
    shutil.copytree(data_config.images, "images")
    shutil.copytree(data_config.cache, "cache")
    shutil.copytree(vae, "vae")
    options = {
        "data.cache": "cache",
        "data.vae": "vae",
        "schedule.steps": 2,
        "model": {"start_from": "origin/pipeline"},
    }
    config = make_config("run", **options)
    config = build(TrainConfig, to_dict(config) | {"output": "run"})
    train(config)
    return config


def again(run: TrainConfig, **changes: str | None) -> Trainer:
    tree = to_dict(run)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (tree[section] if section else tree)[name] = value
    return Trainer(build(TrainConfig, tree))


WRITTEN = ["./{}", "{}/", "{}/../{}", "~/{}", "ABSOLUTE/{}", "link/{}", "copy/{}"]


@pytest.mark.parametrize("written", WRITTEN)
def test_a_run_goes_on_under_other_paths_to_the_same(run: TrainConfig, tmp_path: Path, written: str) -> None:
    (tmp_path / "link").symlink_to(".")
    if written.startswith("copy"):
        for name in ("cache", "vae", "origin", "run"):
            shutil.copytree(name, tmp_path / "copy" / name)

    def place(name: str) -> str:
        return written.replace("ABSOLUTE", str(tmp_path)).format(name, name)

    trainer = again(
        run,
        output=place("run"),
        data__cache=place("cache"),
        data__vae=place("vae"),
        model__start_from=f"{place('origin')}/pipeline".replace("//", "/"),
        resume="latest",
    )
    assert trainer.step == 2


def test_a_run_goes_on_from_a_checkpoint_under_any_path(run: TrainConfig) -> None:
    checkpoint = next(Path("run/checkpoints").glob("step-*"))
    for written in (f"~/{checkpoint}", f"./{checkpoint}/", os.path.abspath(checkpoint)):
        assert again(run, resume=written).step == 2


def test_a_run_goes_on_with_the_vae_of_its_origin_unset_or_named(run: TrainConfig) -> None:
    tree = to_dict(run)
    del tree["data"]["vae"]
    assert Trainer(build(TrainConfig, tree)).step == 2


def test_a_run_goes_on_with_a_cache_made_anew_of_the_same_images(run, data_config, tmp_path: Path) -> None:
    cache_latents(replace(data_config, images="images", vae="vae", cache="anew"))
    assert again(run, data__cache="anew").step == 2


def test_a_run_does_not_go_on_with_another_cache(run, data_config) -> None:
    from PIL import Image

    Image.new("L", (16, 16)).save("images/1/0.png")
    cache_latents(replace(data_config, images="images", cache="other"))
    with pytest.raises(CheckpointError, match="the images, their order or classes were others"):
        again(run, data__cache="other")
    cache_latents(replace(data_config, cache="half", dtype="float16"))
    with pytest.raises(CheckpointError, match="images"):
        again(run, data__cache="half")
    with pytest.raises(CheckpointError, match="data.cache was 'cache', now None"):
        again(run, data__cache=None, data__images="images")


def test_a_run_does_not_go_on_with_another_vae(run, data_config) -> None:
    vae = AutoencoderKL.from_pretrained("vae")
    torch.nn.init.ones_(vae.quant_conv.bias)
    vae.save_pretrained("other_vae")
    cache_latents(replace(data_config, vae="other_vae", cache="other"))
    with pytest.raises(CheckpointError, match="the VAE's weights were others"):
        again(run, data__cache="other", data__vae="other_vae")


def test_a_run_does_not_go_on_from_another_pipeline(run: TrainConfig) -> None:
    shutil.copytree("origin", "other")
    file = Path("other/pipeline/transformer/diffusion_pytorch_model.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    save_file(tensors | {name: tensors[name] + 1}, file)
    with pytest.raises(CheckpointError, match="the weights of model.start_from were others"):
        again(run, model__start_from="other/pipeline")
    tree = to_dict(run)
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    tree["model"] |= {"start_from": None, "num_class_tokens": 2} | sizes
    with pytest.raises(CheckpointError, match="model.start_from was"):
        Trainer(build(TrainConfig, tree))


def test_without_a_cache_a_run_sees_images_that_changed_in_place(make_config, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    options = {"data.cache": None, "data.images": str(tmp_path / "images"), "schedule.steps": 2, "data.min_side": 4}
    config = make_config(**options)
    train(config)
    shutil.copytree(tmp_path / "images", tmp_path / "moved")
    assert Trainer(make_config(**options | {"data.images": str(tmp_path / "moved")})).step == 2
    file = tmp_path / "images" / "2" / "0.png"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError, match="the images, their order or classes were others"):
        Trainer(config)
