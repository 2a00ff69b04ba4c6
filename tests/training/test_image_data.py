"""Training straight from images: what is drawn of them, and that a run keeps all the promises of one from a cache."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from rounding import CURVE, assert_close
from test_sharding import run_split
from test_train import final_tensors, losses, train

from training.cache_latents import cache_latents
from training.data.batches import GroupBatches, batch_loader
from training.data.decoding import BadImage, center_crop, image_to_tensor, random_crop
from training.data.errors import DataError
from training.data.image_dataset import ImageData, open_data
from training.data.latent_cache import LatentCache
from training.data.sources import TableSource
from training.data.vae import PixelEncoder, load_vae
from training.dry_run import describe
from training.outputs.checkpoints import CheckpointError, checkpoint_folders
from training.settings.config import ConfigError, DataConfig
from training.trainer import Trainer


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of the tiny image folder, to spoil."""
    return Path(shutil.copytree(images, tmp_path / "images"))


@pytest.fixture
def data(data_config: DataConfig, folder: Path) -> DataConfig:
    return replace(data_config, images=str(folder), cache=None)


@pytest.fixture
def make_image_config(make_config, folder: Path):
    """`make_config` without a cache."""
    return lambda output="run", **changes: make_config(
        output, **{"data.cache": None, "data.images": str(folder), "data.min_side": 4} | changes
    )


def opened(data: DataConfig) -> ImageData:
    found = open_data(data, load_vae(data.vae))
    assert isinstance(found, ImageData)
    return found


def batches(data: ImageData, group_size: int = 1, **options) -> GroupBatches:
    settings = {"batch_size": 4, "diffusion_batch_mul": 2, "label_dropout": 0.0, "seed": 0} | options
    return GroupBatches(data, group_size, **settings)


# --- crops ---


def test_a_random_crop_is_a_square_of_the_whole_shorter_side() -> None:
    wide = Image.fromarray(np.arange(4 * 7, dtype=np.uint8).reshape(4, 7))
    for position, left in ((0.0, 0), (0.3, 1), (0.999, 3)):
        assert np.array_equal(np.asarray(random_crop(wide, 4, position)), np.asarray(wide)[:, left : left + 4])
    tall = wide.transpose(Image.Transpose.TRANSPOSE)
    assert np.array_equal(np.asarray(random_crop(tall, 4, 0.3)), np.asarray(tall)[1:5])
    assert random_crop(wide, 9, 0.5).size == (9, 9)


def test_the_middle_of_the_random_crops_is_the_centre_crop_where_nothing_is_scaled() -> None:
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 13), dtype=np.uint8))
    assert np.array_equal(np.asarray(random_crop(wide, 8, 2.5 / 6)), np.asarray(center_crop(wide, 8)))


# --- batches ---


def test_crop_and_mirror_differ_from_epoch_to_epoch_and_follow_from_the_seed(data: DataConfig) -> None:
    found = opened(data)
    wide = int(np.flatnonzero(found.labels == 1)[8])  # 24 x 16: nine crops and their mirrors
    seen = {
        tuple(found.draw(wide, (crop / 9, flip))["pixels"].flatten().tolist())
        for crop in range(9)
        for flip in (0, 0.5)
    }
    assert len(seen) == 18
    plain = replace(data, mirror=False)
    assert torch.equal(opened(plain).draw(wide, (0.0, 0.0))["pixels"], opened(plain).draw(wide, (0.0, 0.9))["pixels"])
    one, other = batches(found)[1], batches(opened(data))[1]
    assert all(torch.equal(one[name], other[name]) for name in one)
    drawn = [batches(found, batch_size=len(found))[epoch] for epoch in range(2)]
    first, second = (batch["pixels"][batch["wanted"].flatten().argsort()] for batch in drawn)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) < len(found)


def test_encoded_pixels_are_the_latents_of_a_cache(data: DataConfig, folder: Path, tmp_path: Path) -> None:
    """Square images of the right size have one crop: what the VAE makes of it is what a cache holds."""
    for path in folder.rglob("*.png"):
        Image.open(path).crop((0, 0, 16, 16)).save(path)
    plain = replace(data, mirror=False)
    cache = cache_latents(replace(plain, cache=str(tmp_path / "cache")))
    batch = batches(opened(plain), group_size=4)[0]
    normal = batch["posterior"]
    drawn = [[cache.draw(image, (0.0,)) for image in group] for group in batch["wanted"].tolist()]
    stacked = {
        name: torch.stack([torch.stack([image[name] for image in group]) for group in drawn])
        for name in ("mean", "std")
    }
    expected = cache.collect(stacked, normal)["latents"]
    vae = load_vae(data.vae)
    for chunk in (1, 3, 99):
        encoded = PixelEncoder(vae, chunk, autocast=False)(batch)
        assert_close(encoded["latents"], expected)
    assert encoded.keys() == {"latents", "labels", "timesteps", "noise"}
    assert PixelEncoder(vae, 2, autocast=False)(encoded) is encoded


def test_a_group_of_one_image_is_encoded_once(data: DataConfig) -> None:
    batch = batches(opened(data), group_size=3, same_image=True)[0]
    assert batch["pixels"].shape[1] == 1
    latents = PixelEncoder(load_vae(data.vae), 8, autocast=False)(batch)["latents"]
    assert latents.shape[1] == 3
    assert torch.equal(latents[:, 0], latents[:, 2])


def test_workers_change_no_number(data: DataConfig) -> None:
    found = batches(opened(data), group_size=4)
    for mine, theirs in zip(batch_loader(found, 0, 3), batch_loader(found, 0, 3, workers=2), strict=True):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- images that cannot be read ---


def test_an_unreadable_image_is_replaced_by_one_of_its_class_and_named_once(make_image_config, folder, capsys) -> None:
    (folder / "2" / "3.png").write_bytes(b"no image")
    config = make_image_config(**{"schedule.steps": 10, "checkpoints.every": 5})
    train(config)
    output = capsys.readouterr().out
    assert output.count("2/3.png: ") == 1
    assert "1 image(s) could not be read and were replaced" in output
    (line,) = (Path(config.output) / "unreadable.txt").read_text().splitlines()
    assert line.startswith("2/3.png: UnidentifiedImageError: cannot identify image file")
    assert "0x" not in line
    shutil.rmtree(checkpoint_folders(Path(config.output))[-1])
    train(config)  # from step 5: named already
    assert "2/3.png: " not in capsys.readouterr().out


def test_the_replacement_is_always_the_same_and_of_the_same_class(data: DataConfig, folder: Path) -> None:
    found = opened(data)
    members = np.flatnonzero(found.labels == 1).tolist()
    for index in (8, 0):  # the last one and, after it, the first one of the class
        (folder / "2" / f"{index}.png").write_bytes(b"")
    with pytest.raises(BadImage):
        found.pixels(members[8], 0.0)
    for _ in range(2):
        drawn = found.draw(members[8], (0.2, 0.9))
        assert (drawn["wanted"], drawn["used"]) == (members[8], members[1])
        assert torch.equal(drawn["pixels"], found.draw(members[1], (0.2, 0.9))["pixels"])


def test_a_class_without_a_readable_image_is_replaced_with_its_label(data: DataConfig, folder: Path) -> None:
    for path in (folder / "10").iterdir():
        path.write_bytes(b"")
    found = opened(data)
    batch = batches(found, group_size=4, batch_size=6)[0]
    labels = found.labels[batch["used"].numpy()]
    assert (labels == labels[:, :1]).all()
    assert batch["labels"].tolist() == labels[:, 0].tolist()
    assert set(batch["labels"].tolist()) == {0, 1}
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match=r"none of the 17 images can be read, such as .*\.png: UnidentifiedImageError"):
        found.draw(3, (0.0, 0.0))


def test_held_out_images_that_cannot_be_read_are_left_out(make_image_config, folder: Path) -> None:
    options = {"validation.fraction": 0.2, "schedule.steps": 2}
    held_out = Trainer(make_image_config(**options)).validation.batches.data
    names = [held_out.example(image).name for image in range(len(held_out))]
    (folder / names[0]).write_bytes(b"")
    trainer = train(make_image_config("other", **options))
    left = trainer.validation.batches.data
    assert [left.example(image).name for image in range(len(left))] == names[1:]
    for name in names:
        (folder / name).write_bytes(b"")
    with pytest.raises(DataError, match="none of the held-out images can be read"):
        Trainer(make_image_config("third", **options))


def test_small_images_are_unreadable_and_rows_without_a_label_are_left_out(data: DataConfig) -> None:
    rows = {"image": [Image.new("L", (size, size)) for size in (16, 16, 3)], "label": [1, -1, 0]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict(rows, features=features)
    found = ImageData(TableSource(table, data), load_vae(data.vae), data)
    assert found.labels.tolist() == [1, 0]
    assert found.pixels(0, 0.0).equal(image_to_tensor(Image.new("L", (16, 16))))
    with pytest.raises(BadImage, match="3x3 pixels"):
        found.pixels(1, 0.0)


# --- runs ---


@pytest.mark.parametrize("patch_size", [1, 2])
def test_a_resumed_run_is_bit_identical_to_one_that_went_through(make_image_config, patch_size: int) -> None:
    options = {"model.patch_size": patch_size, "model.dropout": 0.3, "schedule.steps": 5, "checkpoints.keep": 3}
    whole, killed = make_image_config("whole", **options), make_image_config("killed", **options)
    train(whole)
    shutil.copytree(whole.output, killed.output)
    for path in (*checkpoint_folders(Path(killed.output))[1:], Path(killed.output) / "pipeline"):
        shutil.rmtree(path)
    train(killed)
    assert losses(killed.output) == losses(whole.output)
    expected, found = final_tensors(whole.output), final_tensors(killed.output)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.timeout(900)
def test_two_processes_give_the_curve_of_one_with_held_out_images(make_image_config, folder: Path) -> None:
    (folder / "2" / "3.png").write_bytes(b"no image")
    options = {"model.dropout": 0.0, "model.patch_size": 2, "schedule.steps": 4, "validation.fraction": 0.2}
    one, two = make_image_config("one", **options), make_image_config("two", **options, **{"data.batch_size": 2})
    train(one)
    run_split(two)
    assert losses(two.output) == pytest.approx(losses(one.output), rel=CURVE)
    validations = [
        json.loads((Path(config.output) / "validation.jsonl").read_text().splitlines()[-1]) for config in (one, two)
    ]
    assert validations[0] == pytest.approx(validations[1], rel=CURVE)
    assert (Path(two.output) / "unreadable.txt").read_text().startswith("2/3.png: ")


def test_other_images_do_not_continue_a_run(make_image_config, folder: Path) -> None:
    config = make_image_config(**{"schedule.steps": 2})
    train(config)
    shutil.copyfile(folder / "1" / "0.png", folder / "1" / "99.png")
    with pytest.raises(CheckpointError, match="the images, their order or classes were others"):
        Trainer(config)


def test_a_table_serves_and_a_stream_is_refused_with_the_way_out(make_image_config, images: Path, tmp_path) -> None:
    rows = {"image": [str(path) for path in sorted(images.rglob("*.png"))]}
    rows["label"] = [Path(path).parent.name for path in rows["image"]]
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    table.save_to_disk(tmp_path / "saved")
    options = {"data.images": None, "data.dataset": str(tmp_path / "saved"), "schedule.steps": 2}
    trainer = train(make_image_config(**options))
    assert (len(trainer.data), trainer.data.classes) == (17, ["1", "2", "10"])
    with pytest.raises(ConfigError, match="stream.*set data.cache"):
        Trainer(make_image_config("stream", **options, **{"data.streaming": True}))


def test_a_dry_run_reads_images_and_writes_nothing(make_image_config, folder: Path) -> None:
    for path in list((folder / "2").iterdir())[1:]:
        path.write_bytes(b"")
    config = make_image_config(**{"data.batch_size": 17})
    text = describe(Trainer(config))
    assert "forward and backward, without the VAE's encoding" in text
    assert "latents (17, 1, 4, 4, 4)" in text
    assert not Path(config.output).exists()


def test_bf16_encodes_in_bf16_and_stays_near_float32(data: DataConfig) -> None:
    batch, vae = batches(opened(data))[0], load_vae(data.vae)
    full, half = (PixelEncoder(vae, 4, autocast)(batch)["latents"] for autocast in (False, True))
    assert half.dtype == torch.float32
    assert 0 < ((half - full).norm() / full.norm()).item() < 0.02


def test_one_of_cache_and_images_is_needed(make_config) -> None:
    with pytest.raises(ConfigError, match="data.cache is missing"):
        make_config(**{"data.cache": None})


def test_a_cache_is_not_written_nowhere(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="data.cache is missing: the folder to write"):
        cache_latents(data)


def test_a_cache_made_anew_from_other_images_does_not_continue_a_run(make_config, data, folder, tmp_path) -> None:
    own = replace(data, cache=str(tmp_path / "own"))
    cache_latents(own)
    config = make_config(**{"data.cache": own.cache, "schedule.steps": 2})
    train(config)
    shutil.rmtree(own.cache)
    shutil.copyfile(folder / "1" / "0.png", folder / "1" / "99.png")
    assert isinstance(cache_latents(own), LatentCache)
    with pytest.raises(CheckpointError, match="the images, their order or classes were others"):
        Trainer(config)
