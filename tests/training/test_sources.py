"""Image folders and Hugging Face datasets as sources: order of classes, rows, streams, sharing; all made here."""

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pytest
import torch
import yaml
from launching import launch
from PIL import Image
from rounding import assert_close

from training.cache_latents import ShardWriter, cache_latents, report
from training.data.errors import CacheError, DataError
from training.data.latent_cache import LatentCache
from training.data.sources import FolderSource, Source, open_source
from training.data.vae import load_vae
from training.settings.config import ConfigError, DataConfig


REPOSITORY = Path(__file__).parents[2]
NAMES = ["cat", "dog", "ant"]
LABELS = [0, 1, 2, 0, 1, 2, 0, 1, 0, 0]


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test prepares its datasets itself."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "prepared")
    datasets.disable_progress_bars()


def picture(index: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(index).integers(0, 256, (16, 20), dtype=np.uint8))


def encoded(index: int) -> bytes:
    buffer = io.BytesIO()
    picture(index).save(buffer, "PNG")
    return buffer.getvalue()


def table(label: object | None = None, labels: list | None = None) -> datasets.Dataset:
    """Ten images with a ClassLabel column, or with another feature and other labels."""
    features = datasets.Features(image=datasets.Image(), label=label or datasets.ClassLabel(names=NAMES))
    rows = {"image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in range(10)], "label": labels or LABELS}
    return datasets.Dataset.from_dict(rows, features=features)


def text_table() -> datasets.Dataset:
    return table(datasets.Value("string"), [NAMES[label] for label in LABELS])


def files(shards: list[list[int]]) -> Iterator[dict]:
    """Rows of a stream with several files, for `IterableDataset.from_generator`."""
    for indices in shards:
        for index in indices:
            yield {"image": {"bytes": encoded(index), "path": f"{index}.png"}, "label": LABELS[index]}


def stream(num_files: int = 3, features: bool = True) -> datasets.IterableDataset:
    shards = [list(range(10))[first::num_files] for first in range(num_files)]
    return datasets.IterableDataset.from_generator(
        files, gen_kwargs={"shards": shards}, features=table().features if features else None
    )


@pytest.fixture
def data(vae: Path, tmp_path: Path) -> DataConfig:
    return DataConfig(
        vae=str(vae), cache=str(tmp_path / "cache"), image_size=16, shard_size=2, encode_batch_size=2, mirror=False
    )


@pytest.fixture
def expected(data: DataConfig, tmp_path: Path) -> dict[int, torch.Tensor]:
    """Posterior means of the ten pictures."""
    cache = cache_latents(dataclasses.replace(data, cache=str(tmp_path / "expected")), table())
    return {index: cache.moments(index, 0)[0] for index in range(10)}


def check(cache: LatentCache, expected: dict[int, torch.Tensor], classes: list[str]) -> None:
    """Every image of the classes is in the cache exactly once, under its own class."""
    wanted = [index for index in expected if NAMES[LABELS[index]] in classes]
    assert cache.classes == classes
    found = []
    for row in range(len(cache)):
        mean = cache.moments(row, 0)[0]
        index = min(wanted, key=lambda index: (expected[index] - mean).abs().max().item())
        assert_close(mean, expected[index])
        assert cache.classes[cache.labels[row]] == NAMES[LABELS[index]]
        found.append(index)
    assert sorted(found) == wanted


# --- where datasets come from ---


def test_a_dataset_in_memory(data: DataConfig, expected: dict) -> None:
    check(cache_latents(data, table()), expected, NAMES)


def test_a_dataset_written_by_save_to_disk(data: DataConfig, expected: dict, tmp_path: Path) -> None:
    datasets.DatasetDict(train=table(), test=table().select([0])).save_to_disk(tmp_path / "saved")
    saved = dataclasses.replace(data, dataset=str(tmp_path / "saved"))
    check(cache_latents(saved), expected, NAMES)
    assert open_source(dataclasses.replace(saved, split="test")).length == 1
    with pytest.raises(ConfigError, match="streaming is on, but .* lies on disk"):
        open_source(dataclasses.replace(saved, streaming=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_parquet_files(data: DataConfig, expected: dict, tmp_path: Path, streaming: bool) -> None:
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        table().shard(3, part).to_parquet(tmp_path / "parquet" / f"train-{part:05d}-of-00003.parquet")
    source = dataclasses.replace(data, dataset=str(tmp_path / "parquet"), streaming=streaming)
    assert open_source(source).num_streams == (3 if streaming else 1)
    check(cache_latents(source), expected, NAMES)


@pytest.mark.parametrize("streaming", [False, True])
def test_an_imagefolder_through_datasets(data: DataConfig, expected: dict, tmp_path: Path, streaming: bool) -> None:
    for index, label in enumerate(LABELS):
        path = tmp_path / "pictures" / "train" / NAMES[label] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(index))
    source = dataclasses.replace(data, dataset=str(tmp_path / "pictures"), streaming=streaming)
    check(cache_latents(source), expected, sorted(NAMES))


@pytest.mark.parametrize("features", [True, False])
def test_a_stream_from_a_generator(data: DataConfig, expected: dict, features: bool) -> None:
    """Without features a stream does not tell its classes; `data.classes` names 0, 1, 2."""
    source = data if features else dataclasses.replace(data, classes=NAMES)
    check(cache_latents(source, stream(features=features)), expected, NAMES)


def test_images_that_a_stream_gives_by_address_only(data: DataConfig, expected: dict) -> None:
    memory = fsspec.filesystem("memory")
    for index in range(10):
        memory.pipe(f"/pictures/{index}.png", encoded(index))

    def addresses() -> Iterator[dict]:
        for index, label in enumerate(LABELS):
            yield {"image": {"bytes": None, "path": f"memory://pictures/{index}.png"}, "label": label}

    by_address = datasets.IterableDataset.from_generator(addresses, features=table().features)
    check(cache_latents(data, by_address), expected, NAMES)


def test_what_cannot_be_opened_is_an_error_with_the_reason(data: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"data.dataset .*empty \(split train\) cannot be opened: .+"):
        open_source(dataclasses.replace(data, dataset=str(tmp_path / "empty")))
    with pytest.raises(ConfigError, match="data.images or data.dataset is missing"):
        open_source(data)
    with pytest.raises(ConfigError, match="both set"):
        dataclasses.replace(data, images="a", dataset="b")
    with pytest.raises(ConfigError, match="streaming needs data.dataset"):
        dataclasses.replace(data, streaming=True)


# --- columns and classes ---


def test_other_column_names(data: DataConfig, expected: dict) -> None:
    renamed = table().rename_columns({"image": "png", "label": "kind"})
    with pytest.raises(ConfigError, match=r"data.image_column is 'image'; the dataset has \['png', 'kind'\]"):
        open_source(data, renamed)
    check(cache_latents(dataclasses.replace(data, image_column="png", label_column="kind"), renamed), expected, NAMES)


def test_names_are_numbered_in_natural_order_and_numbers_too(data: DataConfig) -> None:
    assert open_source(data, text_table()).classes == ["ant", "cat", "dog"]
    numbers = open_source(data, table(datasets.Value("int64"), [10, 2, 2, 10, 2, 2, 10, 2, 2, 10]))
    assert numbers.classes == ["2", "10"]
    assert [example.label for example in numbers.examples(0)] == [1, 0, 0, 1, 0, 0, 1, 0, 0, 1]


@pytest.mark.parametrize("make", [table, text_table, stream])
def test_a_class_list_chooses_and_orders(data: DataConfig, expected: dict, make) -> None:
    chosen = dataclasses.replace(data, classes=["dog", "cat"])
    check(cache_latents(chosen, make()), expected, ["dog", "cat"])


def test_a_class_list_names_plain_numbers(data: DataConfig) -> None:
    plain = table(datasets.Value("int64"))
    assert open_source(data, plain).classes == ["0", "1", "2"]
    assert open_source(dataclasses.replace(data, classes=NAMES), plain).classes == NAMES


def test_wrong_class_lists_are_errors(data: DataConfig) -> None:
    with pytest.raises(ConfigError, match="data.classes names bird, which the dataset does not have"):
        open_source(dataclasses.replace(data, classes=["cat", "bird"]), table())
    with pytest.raises(ConfigError, match="list them in data.classes"):
        open_source(data, stream(features=False))
    with pytest.raises(ConfigError, match="only once"):
        dataclasses.replace(data, classes=["cat", "cat"])


@pytest.mark.parametrize("value", [-1, None])
def test_images_without_a_label_are_skipped_and_named(data: DataConfig, value: int | None) -> None:
    """Hub datasets mark the unlabelled images of their test splits with -1."""
    cache = cache_latents(data, table(labels=[value, *LABELS[1:]]))
    assert len(cache) == 9
    assert f"  row 0: label {value} names no class" in report(cache)


def test_class_folders_can_be_chosen_and_ordered(images: Path) -> None:
    source = FolderSource(images, ["10", "1"])
    assert [example.label for example in source.examples(0)] == [0] * 3 + [1] * 5
    with pytest.raises(ConfigError, match="data.classes names 7"):
        FolderSource(images, ["7"])


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        FolderSource(tmp_path / "none")
    with pytest.raises(DataError, match="no class folders"):
        FolderSource(tmp_path)
    (tmp_path / "cats").mkdir()
    with pytest.raises(DataError, match="without images: cats"):
        FolderSource(tmp_path)


def test_bad_rows_are_named_with_their_file(data: DataConfig) -> None:
    def rows() -> Iterator[dict]:
        yield {"image": {"bytes": b"broken", "path": "broken.png"}, "label": 0}
        yield {"image": {"bytes": encoded(0), "path": "good.png"}, "label": 0}

    cache = cache_latents(data, datasets.IterableDataset.from_generator(rows, features=table().features))
    assert len(cache) == 1
    assert "  file 0 row 0 (broken.png): UnidentifiedImageError" in report(cache)


# --- sharing between processes, continuing ---


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("make", [table, stream])
def test_processes_share_the_work_without_loss_or_repetition(data: DataConfig, tmp_path, make, world_size) -> None:
    """Which shards each of several processes writes: together all, no one twice, whatever their number."""
    source: Source = open_source(data, make())
    cache_latents(dataclasses.replace(data, cache=str(tmp_path / "whole")), make())
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("moments-*")}
    written: dict[str, bytes] = {}
    for rank in range(world_size):
        folder = tmp_path / f"rank{rank}"
        folder.mkdir()
        writer = ShardWriter(
            source, load_vae(data.vae), dataclasses.replace(data, cache=str(folder)), torch.device("cpu"),
            rank, world_size,
        )  # fmt: skip
        writer.write_all(_NoProgress())  # type: ignore[arg-type]
        mine = {path.name: path.read_bytes() for path in folder.glob("moments-*")}
        assert not mine.keys() & written.keys()
        written |= mine
    assert written == whole


class _NoProgress:
    def update(self, count: int) -> None: ...


def test_a_stream_that_broke_off_continues_with_what_is_missing(data: DataConfig, expected: dict) -> None:
    class Broken(Exception):
        pass

    whole = stream()

    def breaking(shards: list[list[int]]) -> Iterator[dict]:
        yield from files(shards[:1])
        raise Broken

    shards = [list(range(10))[first::3] for first in range(3)]
    failing = datasets.IterableDataset.from_generator(breaking, gen_kwargs={"shards": shards}, features=whole.features)
    with pytest.raises(Broken):
        cache_latents(data, failing)
    before = {path: path.stat().st_mtime_ns for path in Path(data.cache).glob("moments-*")}
    assert before
    check(cache_latents(data, whole), expected, NAMES)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_cache_of_another_dataset_is_refused(data: DataConfig) -> None:
    cache_latents(data, table())
    with pytest.raises(CacheError, match="images is"):
        cache_latents(data, table().select(range(9)))
    with pytest.raises(CacheError, match="classes is"):
        cache_latents(dataclasses.replace(data, classes=["dog", "cat"]), table())


@pytest.mark.timeout(900)
def test_two_real_processes_make_the_cache_of_one(data: DataConfig, expected: dict, tmp_path: Path) -> None:
    """Of three data files, streamed, one process takes two and the other one."""
    (tmp_path / "parquet").mkdir()
    for part in range(3):
        table().shard(3, part).to_parquet(tmp_path / "parquet" / f"train-{part:05d}-of-00003.parquet")
    config = {
        "output": str(tmp_path / "run"),
        "model": {"preset": "B"},
        "schedule": {"steps": 1},
        "data": {"vae": data.vae, "cache": data.cache, "image_size": 16, "shard_size": 2, "mirror": False}
        | {"dataset": str(tmp_path / "parquet"), "streaming": True},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    output = launch("training.cache_latents", f"--config={file}")
    assert [line.split(" in ")[0] for line in output.splitlines() if "encoded" in line] == ["encoded 10 images"]
    check(LatentCache(data.cache), expected, NAMES)
