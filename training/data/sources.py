"""Where images come from: a folder with a sub-folder per class, or a Hugging Face dataset, map-style or streaming.

A source gives its classes in a stable order and its images in *streams*: the data files of a streaming dataset, one
single stream otherwise. An image is described by an `Example`, which costs nothing until it is loaded, so that images
already cached are passed over quickly. A stream is always read in the same order.

The order of classes: `data.classes` if it is given, else that of the dataset's `ClassLabel` feature, else the natural
order of the names ("2" before "10").
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow

from training.settings.config import ConfigError, DataConfig, require

from .errors import DataError
from .examples import Example, IndexedSource
from .examples import Source as Source
from .folders import FolderSource, printable, status_of, times
from .labels import Labels, listed, natural_key
from .latent_cache import digest_of


COMPARED_OF_A_STREAM = 8  # images of each stream that are compared with a cache, if they come over a network


def open_source(data: DataConfig, dataset: datasets.Dataset | datasets.IterableDataset | None = None) -> Source:
    """The source that `data` describes, or the given dataset read with the columns and classes of `data`.

    Raises:
        ConfigError: if columns or classes are not there.
        DataError: if the folder or the dataset cannot be read.
    """
    if dataset is None and data.dataset is None:
        require(data.images is not None, "data.images or data.dataset is missing: where the images are")
        return FolderSource(Path(str(data.images)), data.classes)
    if dataset is None:
        dataset = load(data)
    else:  # `data` does not tell where it comes from
        data = replace(data, dataset=None, streaming=False)
    check_column(dataset, data.image_column, "image_column")
    check_column(dataset, data.label_column, "label_column")
    return StreamSource(dataset, data) if isinstance(dataset, datasets.IterableDataset) else TableSource(dataset, data)


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def load(data: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """`data.dataset`: a folder of `save_to_disk`, or whatever `datasets.load_dataset` takes, such as a Hub name.

    Raises:
        DataError: with the reason of the datasets library.
    """
    path = Path(str(data.dataset))
    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    try:
        if saved:
            require(not data.streaming, f"data.streaming is on, but {path} lies on disk: turn it off")
            found = datasets.load_from_disk(str(path))
            return found[data.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(str(path) if path.exists() else str(data.dataset), data.subset,
                                     split=data.split, streaming=data.streaming)  # fmt: skip
    except ConfigError:
        raise
    except Exception as error:  # the library raises many kinds, from OSError to its own
        raise DataError(f"data.dataset {data.dataset} (split {data.split}) cannot be opened: {error}") from error


def check_column(dataset: datasets.Dataset | datasets.IterableDataset, name: str, option: str) -> None:
    columns = dataset.column_names
    require(columns is None or name in columns, f"data.{option} is {name!r}; the dataset has {columns}")


def undecoded(dataset: Any, column: str) -> Any:
    """The dataset with the encoded bytes of its images in place of decoded ones, where its features are known."""
    dataset = dataset.with_format(None)
    if dataset.features is not None and isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def image_name(row: str, value: Any) -> str:
    """The row and, where the dataset keeps it, the file's name."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"{row} ({printable(Path(path).name)})" if path else row


def remote_bytes(value: Any) -> Any:
    """Fetch an image that a streaming dataset gives by address (`zip://a.png::https://...`) only."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    if path is None or "://" not in path:
        return value
    with fsspec.open(path, "rb") as file:
        return file.read()


class TableSource(IndexedSource):
    """A map-style dataset; rows are read one by one, labels all at once.

    Raises:
        DataError: if no row has a label.
        ConfigError: if labels and `data.classes` do not fit.
    """

    def __init__(self, dataset: datasets.Dataset, data: DataConfig) -> None:
        self.dataset, self.column = dataset, data.image_column
        self.values = list(dataset.with_format(None)[data.label_column])
        self.labels = Labels(dataset.features[data.label_column], self.values, data.classes)
        self.classes = self.labels.classes
        self.images = undecoded(dataset.select_columns([data.image_column]), data.image_column)
        self.rows, problems = [], []
        for row in range(len(self.values)):
            if (example := self.example_of(row)) is not None:  # its class is used
                self.rows.append(row)
                problems += [example.problem] if example.problem else []
        if len(problems) == len(self.rows):
            first = f": {problems[0]}" if problems else ""
            raise DataError(f"none of the {len(self.values)} images has a label that names a class{first}")
        self.length = len(self.rows)
        left_out = self.labels.left_out
        self.notes = [f"left out {sum(left_out.values())} image(s) {of_other_classes(left_out)}"] if left_out else []
        self.digest = digest_of(list(map(str, self.values)))

    def stamp(self) -> str | None:
        """Of the table's files, and of those that it only names; None for a table in memory."""
        tables = [file["filename"] for file in self.dataset.cache_files]
        named = self.named_files()
        if not tables and len(named) < len(self.values):
            return None
        files = [times(status_of(Path(file))) for file in [*tables, *named]]
        return digest_of(files, self.dataset._fingerprint)

    def named_files(self) -> list[str]:
        """The paths of the images that the table names and does not hold."""
        paths: list[str] = []
        for batch in self.images.with_format("arrow").iter(batch_size=1000):
            for chunk in batch[self.column].chunks:
                if pyarrow.types.is_struct(chunk.type):
                    is_named = chunk.field("bytes").is_null().to_pylist()
                    paths += itertools.compress(chunk.field("path").to_pylist(), is_named)
                elif pyarrow.types.is_string(chunk.type) or pyarrow.types.is_large_string(chunk.type):
                    paths += chunk.to_pylist()
        return [path for path in paths if path is not None]

    def example_of(self, row: int) -> Example | None:
        """The example in a row; None if its class is not used."""
        return self.labels.example(f"row {row}", self.values[row], lambda: self.images[row][self.column])

    def example(self, index: int) -> Example:
        example = self.example_of(self.rows[index])
        assert example is not None
        return example


class StreamSource:
    """A streaming dataset; each of its data files is a stream, so several processes read different files.

    The number of images is not known. Of streams that do not come from a folder here only the first images are
    compared with a cache: the others would have to be downloaded again.
    """

    length = None

    def __init__(self, dataset: datasets.IterableDataset, data: DataConfig) -> None:
        feature = dataset.features[data.label_column] if dataset.features is not None else None
        self.labels = Labels(feature, None, data.classes)
        self.classes = self.labels.classes
        self.dataset = undecoded(dataset, data.image_column)
        self.data = data
        self.num_streams = dataset.num_shards
        self.folder = local_folder(data)
        self.compared = COMPARED_OF_A_STREAM if self.folder is None else None
        name = data.dataset if self.folder is None else None
        self.digest = digest_of(name, data.subset, data.split, self.num_streams)

    @property
    def notes(self) -> list[str]:
        """What was left out of the streams that have been read so far."""
        return [f"left out images {of_other_classes(self.labels.left_out)}"] if self.labels.left_out else []

    def stamp(self) -> str | None:
        if self.folder is None:
            return None
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return digest_of([(path.relative_to(self.folder).as_posix(), times(status_of(path))) for path in files])

    def examples(self, stream: int) -> Iterator[Example]:
        for row, values in enumerate(self.dataset.shard(self.num_streams, stream)):
            for column in (self.data.image_column, self.data.label_column):
                require(column in values, f"the stream has no column {column!r}; it has {', '.join(values)}")
            image = values[self.data.image_column]
            name = image_name(f"file {stream} row {row}", image)
            load = lambda image=image: remote_bytes(image)  # noqa: E731
            if example := self.labels.example(name, values[self.data.label_column], load):
                yield example


def of_other_classes(left_out: Counter[str]) -> str:
    return f"of classes that data.classes does not name: {listed(sorted(left_out, key=natural_key))}"


def local_folder(data: DataConfig) -> Path | None:
    """`data.dataset`, if it is a folder here."""
    return Path(data.dataset) if data.dataset is not None and Path(data.dataset).is_dir() else None
