"""The latent cache: contents, continuing after a kill, refusing what was made otherwise."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from rounding import assert_close

from training.cache_latents import cache_latents, report
from training.data.batches import GroupBatches
from training.data.decoding import read_image
from training.data.errors import CacheError, DataError
from training.data.latent_cache import LatentCache
from training.data.sources import FolderSource
from training.data.vae import load_vae, module_fingerprint
from training.settings.config import ConfigError, DataConfig


@pytest.fixture
def own(data_config: DataConfig, cache: LatentCache, tmp_path: Path) -> DataConfig:
    """A data section with a private copy of images and finished cache, free to be damaged."""
    shutil.copytree(str(data_config.images), tmp_path / "images")
    shutil.copytree(cache.folder, tmp_path / "cache")
    return dataclasses.replace(data_config, images=str(tmp_path / "images"), cache=str(tmp_path / "cache"))


def test_classes_are_in_natural_order_and_every_image_has_its_class(cache: LatentCache) -> None:
    assert cache.classes == ["1", "2", "10"]
    assert cache.labels.tolist() == [0] * 5 + [1] * 9 + [2] * 3
    assert cache.latent_shape == (4, 4, 4)


def test_moments_are_those_of_the_image_and_of_its_mirror(cache: LatentCache, data_config: DataConfig) -> None:
    vae = AutoencoderKL.from_pretrained(data_config.vae).eval()
    path, _ = FolderSource(Path(str(data_config.images))).files[8]  # in the second shard
    pixels = read_image(path, 16, 1)
    for view, tensor in enumerate([pixels, pixels.flip(-1)]):
        with torch.no_grad():
            posterior = vae.encode(tensor[None]).latent_dist
        mean, std = cache.moments(8, view)
        assert_close(mean, posterior.mean[0])
        assert_close(std, posterior.std[0])


def test_the_reported_std_is_that_of_posterior_samples(cache: LatentCache) -> None:
    mean = torch.cat([shard["mean"] for shard in cache.shards])
    std = torch.cat([shard["std"] for shard in cache.shards])
    samples = mean + std * torch.randn(50, *mean.shape, generator=torch.Generator().manual_seed(0))
    index = json.loads((cache.folder / "index.json").read_text())
    assert index["latent_std"] == pytest.approx(samples.std().item(), rel=0.01)
    assert f"{index['latent_std']:.4f}" in report(cache)


def test_without_mirror_there_is_one_view(own: DataConfig, tmp_path: Path) -> None:
    plain = cache_latents(dataclasses.replace(own, mirror=False, dtype="float16", cache=str(tmp_path / "plain")))
    mirrored = LatentCache(own.cache)
    assert plain.num_views == 1
    torch.testing.assert_close(plain.moments(3, 0)[0], mirrored.moments(3, 0)[0], atol=1e-2, rtol=1e-2)


def test_only_missing_shards_are_encoded_again(own: DataConfig) -> None:
    folder = Path(own.cache)
    wanted = (folder / "moments-00000-00001.safetensors").read_bytes()
    (folder / "moments-00000-00001.safetensors").unlink()
    (folder / "index.json").unlink()
    (folder / "moments-00000-00001.123.partial").write_bytes(b"half a shard")
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("moments-*.safetensors")}
    with pytest.raises(CacheError, match="unfinished"):
        LatentCache(folder)
    assert len(cache_latents(own)) == 17
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("moments-*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert (folder / "moments-00000-00001.safetensors").read_bytes() == wanted


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_size": 8}, "image_size is 16 in the cache, 8 now"),
        ({"mirror": False}, "mirror is True in the cache, False now"),
        ({"shard_size": 4}, "shard_size is 7 in the cache, 4 now"),
    ],
)
def test_a_cache_made_with_other_settings_is_refused(own: DataConfig, change: dict, words: str) -> None:
    with pytest.raises(CacheError, match=words):
        cache_latents(dataclasses.replace(own, **change))


def test_a_cache_of_other_images_or_another_vae_is_refused(own: DataConfig, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(own.vae)
    vae.quant_conv.weight.data += 1e-3
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(CacheError, match="vae_fingerprint"):
        cache_latents(dataclasses.replace(own, vae=str(tmp_path / "vae")))
    (Path(str(own.images)) / "2" / "0.png").unlink()
    with pytest.raises(CacheError, match="images is"):
        cache_latents(own)


def test_the_fingerprint_does_not_depend_on_where_the_vae_lies(own: DataConfig, tmp_path: Path) -> None:
    vae = AutoencoderKL.from_pretrained(own.vae)
    vae.save_pretrained(tmp_path / "elsewhere")
    moved = AutoencoderKL.from_pretrained(tmp_path / "elsewhere")
    assert module_fingerprint(vae, dict(vae.config)) == module_fingerprint(moved, dict(moved.config))


def test_images_that_cannot_be_used_are_skipped_counted_and_named_with_the_reason(
    own: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(str(own.images)) / "2" / "1.png"
    bad.write_bytes(bad.read_bytes()[:60])
    cache = cache_latents(dataclasses.replace(own, cache=str(tmp_path / "fresh")))
    assert len(cache) == 16
    assert cache.labels.tolist() == [0] * 5 + [1] * 8 + [2] * 3
    assert "skipped 1 image(s) that cannot be used:\n  2/1.png: " in report(cache)
    assert "1 image(s) skipped, the first is 2/1.png" in capsys.readouterr().out
    small = dataclasses.replace(own, min_side=17, cache=str(tmp_path / "small"))
    with pytest.raises(DataError, match=r"none of the 17 images can be used: 1/0.png: 16x16 pixels; .* must have 17"):
        cache_latents(small)


def test_a_shard_of_bad_images_is_empty_and_harms_no_other(own: DataConfig, tmp_path: Path) -> None:
    for path in (Path(str(own.images)) / "1").iterdir():
        path.write_bytes(b"not an image")
    cache = cache_latents(dataclasses.replace(own, shard_size=5, cache=str(tmp_path / "fresh")))
    assert len(cache.shards[0]["labels"]) == 0
    assert cache.labels.tolist() == [1] * 9 + [2] * 3
    whole = LatentCache(own.cache)
    for image in range(len(cache)):
        for found, expected in zip(cache.moments(image, 0), whole.moments(image + 5, 0), strict=True):
            assert_close(found, expected)


def test_the_report_tells_speed_and_bytes(own: DataConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fresh = dataclasses.replace(own, cache=str(tmp_path / "fresh"))
    cache = cache_latents(fresh)
    assert "encoded 17 images in" in capsys.readouterr().out
    size = sum(path.stat().st_size for path in cache.folder.glob("moments-*"))
    assert f"{size / 17:,.0f} bytes per image" in report(cache)
    cache_latents(fresh)
    assert "nothing was left to encode" in capsys.readouterr().out


def test_scaling_and_shift_are_those_of_the_vae(own: DataConfig, tmp_path: Path) -> None:
    """Training sees (sample - shift) * scaling: as the pipeline undoes it before decoding."""
    vae = AutoencoderKL.from_pretrained(own.vae)
    vae.register_to_config(shift_factor=0.25, scaling_factor=2.0)
    vae.save_pretrained(tmp_path / "vae")
    cache = cache_latents(dataclasses.replace(own, vae=str(tmp_path / "vae"), cache=str(tmp_path / "shifted")))
    before, after = (
        GroupBatches(LatentCache(folder), 1, 4, 1, label_dropout=0.0, seed=0)[0]["latents"]
        for folder in (own.cache, cache.folder)
    )
    torch.testing.assert_close(after, (before / 0.5 - 0.25) * 2.0, atol=1e-5, rtol=1e-5)
    index = json.loads((cache.folder / "index.json").read_text())
    trained_on = f": std {index['latent_std'] * 2:.4f}, mean {(index['latent_mean'] - 0.25) * 2:.4f}"
    advice = f"scaling_factor of {1 / index['latent_std']:.4f} in the VAE's config.json"
    assert trained_on in report(cache)
    assert advice in report(cache)
    assert trained_on in report(cache, from_scratch=False)
    assert "config.json" not in report(cache, from_scratch=False)


def test_a_vae_may_lie_in_a_sub_folder_of_a_hub_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    asked = []
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", lambda *names, **options: calls.append((names, options)))
    monkeypatch.setattr("training.data.vae.check_hub_has", asked.append)
    load_vae("org/name")
    load_vae("org/name/vae")
    assert asked == ["org/name", "org/name"]
    assert calls == [(("org/name",), {}), (("org/name",), {"subfolder": "vae"})]


def test_sizes_that_the_vae_cannot_encode_are_an_error(own: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="image_size is 18; the VAE needs a multiple of 4"):
        cache_latents(dataclasses.replace(own, image_size=18, cache=str(tmp_path / "odd")))


@pytest.mark.parametrize("name", ["checkpoints/vae", "outputs/a/vae", "./vae", "/nowhere/vae"])
def test_a_missing_folder_is_not_looked_for_on_the_hub(name: str, monkeypatch, tmp_path: Path) -> None:
    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the Hub was asked")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoencoderKL, "from_pretrained", asked)
    with pytest.raises(DataError, match=f"there is no folder {name}"):
        load_vae(name)


def test_leftovers_of_killed_processes_are_removed_with_the_last_shard(
    data_config: DataConfig, tmp_path: Path
) -> None:
    own = dataclasses.replace(data_config, cache=str(tmp_path / "own"))
    cache_latents(own)
    leftover = tmp_path / "own" / "moments-00000-00000.1.partial"
    leftover.write_bytes(b"half")
    cache_latents(own)
    assert not leftover.exists()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_shard_is_named_and_made_again_once_it_is_deleted(data_config, tmp_path, damage) -> None:
    data = dataclasses.replace(data_config, cache=str(tmp_path / "cache"))
    whole = cache_latents(data)
    shard = tmp_path / "cache" / "moments-00000-00001.safetensors"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
        with pytest.raises(CacheError, match=f"shard .*{shard.name} .* cannot be read: .*run training.cache_latents"):
            cache_latents(data)
    else:
        shard.unlink()
    with pytest.raises(CacheError, match=f"shard .*{shard.name} of the latent cache cannot be read"):
        LatentCache(tmp_path / "cache")
    shard.unlink(missing_ok=True)
    assert cache_latents(data).digest == whole.digest
