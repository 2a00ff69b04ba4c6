"""A latent cache sees that its images have changed, and only then, whatever sizes and dates say."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from training.cache_latents import cache_latents
from training.data.image_dataset import changed_files
from training.data.latent_cache import CacheError, LatentCache
from training.settings.config import DataConfig
from training.train import Trainer


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8))


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Bitmaps of one size in two classes."""
    for number, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(3):
            picture(10 * number + index).save(tmp_path / "images" / name / f"{index}.bmp")
    return tmp_path / "images"


@pytest.fixture
def data(vae: Path, folder: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        vae=str(vae),
        images=str(folder),
        cache=str(tmp_path / "cache"),
        image_size=16,
        shard_size=2,
        encode_batch_size=2,
        mirror=False,
    )


def overwrite(folder: Path) -> None:
    picture(99).save(folder / "dog" / "1.bmp")


def overwrite_with_its_old_date(folder: Path) -> None:
    before = (folder / "dog" / "1.bmp").stat()
    overwrite(folder)
    os.utime(folder / "dog" / "1.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_file_in_its_place(folder: Path) -> None:
    before = (folder / "dog" / "1.bmp").stat()
    picture(99).save(folder / "new.bmp")
    os.utime(folder / "new.bmp", ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(folder / "new.bmp", folder / "dog" / "1.bmp")


def change_what_a_link_leads_to(folder: Path) -> None:
    (folder / "dog" / "1.bmp").unlink()
    picture(99).save(folder.parent / "elsewhere.bmp")
    (folder / "dog" / "1.bmp").symlink_to(folder.parent / "elsewhere.bmp")


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "swap.bmp")
    (folder / other).rename(folder / one)
    (folder / "swap.bmp").rename(folder / other)


CHANGES: list[Callable[[Path], object]] = [
    overwrite,
    overwrite_with_its_old_date,
    put_another_file_in_its_place,
    change_what_a_link_leads_to,
    lambda folder: swap(folder, "cat/0.bmp", "dog/0.bmp"),  # between classes
    lambda folder: swap(folder, "cat/0.bmp", "cat/2.bmp"),  # within one
    lambda folder: (folder / "dog" / "1.bmp").rename(folder / "dog" / "9.bmp"),
    lambda folder: (folder / "dog" / "1.bmp").unlink(),
    lambda folder: picture(99).save(folder / "dog" / "9.bmp"),
    lambda folder: (folder / "dog" / "1.bmp").write_bytes((folder / "cat" / "1.bmp").read_bytes()[:-9]),
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_cache_of_images_that_have_changed_is_refused(data: DataConfig, folder: Path, change) -> None:
    cache_latents(data)
    change(folder)
    assert len(changed_files(data)) == 1
    for _ in range(2):  # and stays refused
        with pytest.raises(CacheError, match="other images: .*dog/1.bmp|other settings: .*images is|other images"):
            cache_latents(data)


def test_the_report_on_the_bitmaps(data: DataConfig, folder: Path) -> None:
    """The case of the report: all overwritten, and a run right after took the old latents."""
    before = cache_latents(data)
    for path in folder.rglob("*.bmp"):
        Image.new("L", (16, 16), 255).save(path)
    with pytest.raises(
        CacheError, match=r"made of other images: 6 changed since, such as cat/0.bmp, .*another data.cache"
    ):
        cache_latents(data)
    after = cache_latents(dataclasses.replace(data, cache=str(folder.parent / "new")))
    assert not torch.allclose(before.moments(0, 0)[0], after.moments(0, 0)[0])


@pytest.mark.parametrize(
    "touch",
    [
        lambda folder: [os.utime(path) for path in folder.rglob("*.bmp")],
        lambda folder: [path.chmod(0o600) for path in folder.rglob("*.bmp")],
        lambda folder: [path.write_bytes(path.read_bytes()) for path in folder.rglob("*.bmp")],
        lambda folder: (folder / "dog" / "readme.txt").write_text("no image"),
        lambda folder: (folder / ".DS_Store").write_bytes(b""),
    ],
)
def test_files_with_other_dates_and_the_same_contents_are_the_same(data: DataConfig, folder: Path, touch) -> None:
    before = cache_latents(data)
    touch(folder)
    assert cache_latents(data).digest == before.digest
    assert changed_files(data) == []


def test_images_on_another_machine_are_the_same(data: DataConfig, folder: Path, tmp_path: Path, monkeypatch) -> None:
    before = cache_latents(data)
    shutil.copytree(folder, tmp_path / "other" / "images")
    shutil.copytree(str(data.cache), tmp_path / "other" / "cache")
    monkeypatch.chdir(tmp_path / "other")
    moved = dataclasses.replace(data, images="images/", cache="cache")
    assert changed_files(moved) != []
    assert cache_latents(moved).digest == before.digest
    assert changed_files(moved) == []
    shutil.rmtree("images")
    assert changed_files(moved) == []  # training needs none


def test_images_that_change_while_a_run_is_interrupted_are_seen(data: DataConfig, folder: Path) -> None:
    cache_latents(data)
    for name in ("index.json", "stream-00000.json", "moments-00000-00002.safetensors"):
        (Path(str(data.cache)) / name).unlink()
    picture(98).save(folder / "dog" / "2.bmp")  # not encoded yet
    cache_latents(data)
    (Path(str(data.cache)) / "moments-00000-00000.safetensors").unlink()
    overwrite_with_its_old_date(folder)
    with pytest.raises(CacheError, match=r"1 changed since, such as dog/1.bmp"):
        cache_latents(data)


def test_files_that_have_not_changed_are_not_read(data: DataConfig, folder: Path, monkeypatch) -> None:
    cache_latents(data)

    def read(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr(Path, "read_bytes", read)
    cache_latents(data)


# --- data sets ---


def table(seeds: list[int], labels: list[int]) -> datasets.Dataset:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    return datasets.Dataset.from_dict({"image": [picture(seed) for seed in seeds], "label": labels}, features=features)


def parquet(folder: Path, seeds: list[int], labels: list[int]) -> None:
    folder.mkdir(exist_ok=True)
    table(seeds, labels).to_parquet(folder / "train-00000-of-00001.parquet")


SEEDS, LABELS = [1, 2, 3, 4, 5], [0, 1, 0, 1, 1]
OTHERS = [
    ([1, 2, 3, 4, 9], LABELS),
    ([1, 2, 3, 5, 4], LABELS),
    (SEEDS, [0, 1, 0, 0, 1]),
    (SEEDS[:4], LABELS[:4]),
    ([*SEEDS, 6], [*LABELS, 1]),
]


@pytest.mark.parametrize(("seeds", "labels"), OTHERS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files_with_other_images(data, tmp_path, seeds, labels, streaming) -> None:
    parquet(tmp_path / "set", SEEDS, LABELS)
    source = dataclasses.replace(data, images=None, dataset=str(tmp_path / "set"), streaming=streaming)
    before = cache_latents(source)
    assert cache_latents(source).digest == before.digest
    parquet(tmp_path / "set", seeds, labels)
    with pytest.raises(CacheError, match="other images|images is"):
        cache_latents(source)


@pytest.mark.parametrize(("seeds", "labels"), OTHERS)
def test_a_data_set_in_memory_with_other_images(data, seeds, labels) -> None:
    cache_latents(data, table(SEEDS, LABELS))
    cache_latents(data, table(SEEDS, LABELS))
    with pytest.raises(CacheError, match="other images|images is"):
        cache_latents(data, table(seeds, labels))


def test_a_table_that_only_names_its_images(data: DataConfig, folder: Path) -> None:
    paths = sorted(map(str, folder.rglob("*.bmp")))
    rows = datasets.Dataset.from_dict({"image": paths, "label": [Path(path).parent.name for path in paths]})
    rows = rows.cast_column("image", datasets.Image())
    cache_latents(data, rows)
    cache_latents(data, rows)
    overwrite_with_its_old_date(folder)
    with pytest.raises(CacheError, match="1 changed since, such as row 4"):
        cache_latents(data, rows)


def test_a_data_set_under_another_path_is_the_same(data: DataConfig, tmp_path: Path, monkeypatch) -> None:
    table(SEEDS, LABELS).save_to_disk(tmp_path / "saved")
    source = dataclasses.replace(data, images=None, dataset=str(tmp_path / "saved"))
    before = cache_latents(source)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("saved")
    for written in ("saved", "./saved/", "link"):
        assert cache_latents(dataclasses.replace(source, dataset=written)).digest == before.digest


def test_of_a_stream_without_files_here_the_first_images_are_compared(data: DataConfig) -> None:
    def rows(seeds: tuple[int, ...]) -> Iterator[dict]:
        for seed in seeds:
            yield {"image": picture(seed), "label": seed % 2}

    def stream(*seeds: int) -> datasets.IterableDataset:
        features = table([], []).features
        return datasets.IterableDataset.from_generator(rows, gen_kwargs={"seeds": seeds}, features=features)

    cache_latents(data, stream(*range(12)))
    cache_latents(data, stream(*range(12)))
    with pytest.raises(CacheError, match="1 changed since, such as file 0 row 7"):
        cache_latents(data, stream(*range(7), 99, *range(8, 12)))


# --- training ---


def test_a_run_says_that_the_images_of_its_cache_may_have_changed(make_config, data, folder, capsys) -> None:
    cache_latents(data)
    config = make_config(**{"data.cache": data.cache, "data.images": str(folder), "data.mirror": False})
    Trainer(config)
    assert "warning" not in capsys.readouterr().out
    overwrite(folder)
    Trainer(config)
    assert f"warning: the files of {folder} are not as they were" in capsys.readouterr().out


def test_a_cache_of_an_older_format_is_refused_with_the_way_out(data: DataConfig) -> None:
    cache = cache_latents(data)
    index = json.loads((cache.folder / "index.json").read_text())
    index["settings"]["format"] = 1
    (cache.folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(CacheError, match=r"format 1; 2 is expected.*Delete it and run training.cache_latents again"):
        LatentCache(cache.folder)
