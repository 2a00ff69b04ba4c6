"""Commands that take any image folder: dividing it in three, and training a VAE on it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from diffusers import AutoencoderKL
from pictures import size_of
from PIL import Image

from training import split_images, train_vae
from training.cache_latents import cache_latents
from training.data.errors import DataError
from training.data.splits import SPLITS
from training.settings.config import DataConfig, ModelConfig, ScheduleConfig, TrainConfig
from training.trainer import Trainer


COUNTS = {"cats": 10, "dogs": 20}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Colour photographs of two classes, of several sizes and in sub-folders."""
    random = np.random.default_rng(0)
    for name, count in COUNTS.items():
        for index in range(count):
            path = tmp_path / "images" / name / ("more" if index % 2 else ".") / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (20, 20 + index, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_divided_in_three_without_loss_and_always_alike(images: Path, tmp_path: Path, capsys) -> None:
    split_images.main([f"--images={images}", f"--output={tmp_path / 'split'}"])
    assert capsys.readouterr().out == f"{tmp_path / 'split'}: 21 train, 3 validation, 6 test\n"
    parts = {name: files(tmp_path / "split" / name) for name in SPLITS}
    assert sorted(sum(parts.values(), [])) == files(images)
    assert [sum(file.startswith("cats/") for file in parts[name]) for name in SPLITS] == [7, 1, 2]
    file = parts["train"][0]
    assert (tmp_path / "split" / "train" / file).read_bytes() == (images / file).read_bytes()
    split_images.split_images(images, tmp_path / "again")
    assert files(tmp_path / "again") == files(tmp_path / "split")
    split_images.split_images(images, tmp_path / "other", seed=1)
    assert files(tmp_path / "other") != files(tmp_path / "split")


@pytest.mark.parametrize("inside", ["images", "images/split", "images/cats/split", "link/split", "other/../images/x"])
def test_nothing_is_written_among_the_images(images: Path, tmp_path: Path, monkeypatch, inside) -> None:
    """A second run would find another class there."""
    (tmp_path / "link").symlink_to(images)
    before = files(images)
    place = tmp_path / inside
    with pytest.raises(DataError, match="lies inside the image folder .* name a folder beside it"):
        split_images.split_images(images, place)
    data = DataConfig(images=str(images), vae="checkpoints/missing", cache=str(place))
    with pytest.raises(DataError, match="data.cache .* lies inside the image folder"):
        cache_latents(data)
    model, elsewhere = ModelConfig(preset="B"), replace(data, cache=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="output .* lies inside the image folder"):
        Trainer(TrainConfig(output=str(place), model=model, data=elsewhere, schedule=ScheduleConfig(steps=1)))
    assert files(images) == before


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_class_with_too_few_images_is_named_and_nothing_is_written(
    images: Path, tmp_path: Path, capsys, count
) -> None:
    for path in sorted((images / "cats").rglob("*.jpg"))[count:]:
        path.unlink()
    with pytest.raises(SystemExit) as ended:
        split_images.main([f"--images={images}", f"--output={tmp_path / 'split'}"])
    assert ended.value.code == 2
    assert f"its smallest class, cats, has {count} image(s)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_folder_that_is_taken_is_left_alone(images: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        split_images.main([f"--images={images}", f"--output={images}"])
    assert "training.split_images: " in capsys.readouterr().err
    assert sorted(path.name for path in images.iterdir()) == sorted(COUNTS)


def test_a_vae_is_trained_on_any_images(images: Path, tmp_path: Path, capsys) -> None:
    split_images.split_images(images, tmp_path / "split")
    output = tmp_path / "vae"
    train_vae.main([f"--data={tmp_path / 'split'}", f"--output={output}", "--steps=1", "--image-size=16"])
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert AutoencoderKL.from_pretrained(output).config.sample_size == 16
    assert size_of(output / "preview.png") == (16, 3 * 2 * 16)  # three images, each above what came of it


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--image-size=20"], "image_size is 20; the VAE needs a multiple of 8"), ([], "train does not exist")],
)
def test_what_a_vae_cannot_be_trained_on_is_told_before(images: Path, tmp_path: Path, capsys, options, words) -> None:
    with pytest.raises(SystemExit) as ended:
        train_vae.main([f"--data={images}", f"--output={tmp_path / 'vae'}", *options])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "vae").exists()
