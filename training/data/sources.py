"""Where images come from: a folder with a sub-folder per class, or a Hugging Face dataset, map-style or streaming.

A source gives its classes in a stable order and its images in *streams*: the data files of a streaming dataset, one
single stream otherwise. An image is described by an `Example`, which costs nothing until it is loaded, so that images
already cached are passed over quickly. A stream is always read in the same order.

The order of classes: `data.classes` if it is given, else that of the dataset's `ClassLabel` feature, else the natural
order of the names ("2" before "10").
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import datasets
import fsspec

from training.settings.config import ConfigError, DataConfig, require

from .decoding import IMAGE_SUFFIXES
from .latent_cache import CacheError, digest_of


@dataclass(frozen=True)
class Example:
    """An image not loaded yet.

    Attributes:
        name: file name or row, for messages.
        label: class index.
        load: returns the image in a form that `decoding.read_image` takes.
        problem: why the image cannot be used, if its label is wrong; `label` is -1 then.
    """

    name: str
    label: int
    load: Callable[[], Any]
    problem: str = ""


class Source(Protocol):
    """What `cache_latents` needs to know of a data set.

    Attributes:
        classes: class names in index order.
        num_streams: how many streams there are.
        length: images in all, if that is known without reading them.
        digest: changes when the images do, as far as can be told without reading them.
    """

    classes: list[str]
    num_streams: int
    digest: str

    @property
    def length(self) -> int | None: ...

    def examples(self, stream: int) -> Iterator[Example]:
        """The images of one stream, always in the same order."""
        ...


def open_source(data: DataConfig, dataset: datasets.Dataset | datasets.IterableDataset | None = None) -> Source:
    """The source that `data` describes, or the given dataset read with the columns and classes of `data`.

    Raises:
        ConfigError: if columns or classes are not there.
        CacheError: if the folder or the dataset cannot be read.
    """
    if dataset is None and data.dataset is None:
        require(data.images is not None, "data.images or data.dataset is missing: where the images are")
        return FolderSource(Path(str(data.images)), data.classes)
    dataset = load(data) if dataset is None else dataset
    check_column(dataset, data.image_column, "image_column")
    check_column(dataset, data.label_column, "label_column")
    return StreamSource(dataset, data) if isinstance(dataset, datasets.IterableDataset) else TableSource(dataset, data)


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which "img2" stands before "img10"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


class IndexedSource:
    """A source of known length, whose images can be had in any order: one stream.

    Attributes:
        classes, length, digest: as in `Source`.
    """

    num_streams = 1
    classes: list[str]
    length: int
    digest: str

    def example(self, index: int) -> Example:
        """The image with this number in 0 .. length - 1."""
        raise NotImplementedError

    def examples(self, stream: int) -> Iterator[Example]:
        return map(self.example, range(self.length))


# --- image folders ---------------------------------------------------------------------------------------------------


class FolderSource(IndexedSource):
    """A folder with one sub-folder per class, searched at any depth; files of other kinds are passed over.

    Args:
        root: the folder.
        classes: names of the sub-folders to use, in index order; None: all in natural order.

    Raises:
        CacheError: if the folder is missing, or if there is a class without images or no class at all.
    """

    def __init__(self, root: Path, classes: Sequence[str] | None = None) -> None:
        if not root.is_dir():
            raise CacheError(f"image folder {root} does not exist (data.images)")
        names = sorted((path.name for path in root.iterdir() if path.is_dir()), key=natural_key)
        names = [name for name in names if not name.startswith(".")]
        self.root = root
        self.classes = names if classes is None else chosen_classes(classes, names, str(root))
        found = [sorted_images(root / name) for name in self.classes]
        empty = [name for name, images in zip(self.classes, found, strict=True) if not images]
        if empty or not found:
            problem = f"class folders without images: {', '.join(empty[:5])}" if empty else "no class folders"
            raise CacheError(f"{root} has {problem}; put images into one sub-folder per class")
        self.files = [(path, label) for label, images in enumerate(found) for path in images]
        self.length = len(self.files)
        self.digest = digest_of([(self.name(path), path.stat().st_size) for path, _ in self.files])

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def example(self, index: int) -> Example:
        path, label = self.files[index]
        return Example(self.name(path), label, lambda: path)


def sorted_images(folder: Path) -> list[Path]:
    images = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    return sorted(images, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


# --- Hugging Face datasets -------------------------------------------------------------------------------------------


def load(data: DataConfig) -> datasets.Dataset | datasets.IterableDataset:
    """`data.dataset`: a folder of `save_to_disk`, or whatever `datasets.load_dataset` takes, such as a Hub name.

    Raises:
        CacheError: with the reason of the datasets library.
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
        raise CacheError(f"data.dataset {data.dataset} (split {data.split}) cannot be opened: {error}") from error


def check_column(dataset: datasets.Dataset | datasets.IterableDataset, name: str, option: str) -> None:
    columns = dataset.column_names
    require(columns is None or name in columns, f"data.{option} is {name!r}; the dataset has {columns}")


def undecoded(dataset: Any, column: str) -> Any:
    """The dataset with the encoded bytes of its images in place of decoded ones, where its features are known."""
    dataset = dataset.with_format(None)
    if dataset.features is not None and isinstance(dataset.features[column], datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def chosen_classes(wanted: Sequence[str], present: Sequence[str], where: str) -> list[str]:
    missing = [name for name in wanted if name not in present]
    require(not missing, f"data.classes names {', '.join(missing[:5])}, which {where} does not have")
    return list(wanted)


class Labels:
    """Values of a label column to class indices.

    Args:
        feature: the column's feature; None if a stream does not tell.
        values: the whole column; None for streams, whose classes must then be known without reading it.
        classes: `data.classes`: for names (texts or a ClassLabel) the classes to use, in index order, images of
            others being left out; for plain whole numbers the names of 0, 1, 2, ...
    """

    def __init__(self, feature: Any, values: Sequence[Any] | None, classes: Sequence[str] | None) -> None:
        self.partial = classes is not None
        self.names: list[str] | None = None  # what whole numbers mean
        if isinstance(feature, datasets.ClassLabel):
            self.names = list(feature.names)
            self.classes = self.names if classes is None else chosen_classes(classes, self.names, "the dataset")
        elif classes is not None:
            self.names = self.classes = list(classes)
        else:
            require(
                values is not None,
                "a stream whose label column has no ClassLabel feature does not tell its classes: list them in "
                "data.classes",
            )
            self.classes = sorted({str(value) for value in values or () if value is not None}, key=natural_key)
        self.index = {name: label for label, name in enumerate(self.classes)}

    def __call__(self, value: Any) -> int | None:
        """The class index; None: of a class that is not used.

        Raises:
            ValueError: if the value is no label.
        """
        name = None if value is None else str(value)
        if isinstance(value, int) and self.names is not None:
            name = self.names[value] if 0 <= value < len(self.names) else None
        if name is None:
            raise ValueError(f"label {value!r} names no class")
        return self.index.get(name)

    def example(self, name: str, value: Any, load: Callable[[], Any]) -> Example | None:
        """The example of an image with this label; None if its class is not used."""
        try:
            label = self(value)
        except ValueError as error:
            return Example(name, -1, load, str(error))
        return None if label is None else Example(name, label, load)


def image_name(row: str, value: Any) -> str:
    """The row and, where the dataset keeps it, the file's name."""
    path = value.get("path") if isinstance(value, dict) else None
    return f"{row} ({Path(path).name})" if path else row


def remote_bytes(value: Any) -> Any:
    """Fetch an image that a streaming dataset gives by address (`zip://a.png::https://...`) only."""
    path = value.get("path") if isinstance(value, dict) and value.get("bytes") is None else None
    if path is None or "://" not in path:
        return value
    with fsspec.open(path, "rb") as file:
        return file.read()


class TableSource(IndexedSource):
    """A map-style dataset; rows are read one by one, labels all at once."""

    def __init__(self, dataset: datasets.Dataset, data: DataConfig) -> None:
        self.values = list(dataset.with_format(None)[data.label_column])
        self.labels = Labels(dataset.features[data.label_column], self.values, data.classes)
        self.classes = self.labels.classes
        self.images = undecoded(dataset.select_columns([data.image_column]), data.image_column)
        self.column = data.image_column
        # of the rows whose class is used
        self.rows = [row for row in range(len(self.values)) if self.example_of(row) is not None]
        self.length = len(self.rows)
        self.digest = digest_of(data.dataset, data.subset, data.split, self.column, list(map(str, self.values)))

    def example_of(self, row: int) -> Example | None:
        """The example in a row; None if its class is not used."""
        return self.labels.example(f"row {row}", self.values[row], lambda: self.images[row][self.column])

    def example(self, index: int) -> Example:
        example = self.example_of(self.rows[index])
        assert example is not None
        return example


class StreamSource:
    """A streaming dataset; each of its data files is a stream, so several processes read different files.

    The number of images is not known, and a file that changes unnoticed is not detected.
    """

    length = None

    def __init__(self, dataset: datasets.IterableDataset, data: DataConfig) -> None:
        feature = dataset.features[data.label_column] if dataset.features is not None else None
        self.labels = Labels(feature, None, data.classes)
        self.classes = self.labels.classes
        self.dataset = undecoded(dataset, data.image_column)
        self.data = data
        self.num_streams = dataset.num_shards
        self.digest = digest_of(data.dataset, data.subset, data.split, data.image_column, self.num_streams)

    def examples(self, stream: int) -> Iterator[Example]:
        for row, values in enumerate(self.dataset.shard(self.num_streams, stream)):
            for column in (self.data.image_column, self.data.label_column):
                require(column in values, f"the stream has no column {column!r}; it has {', '.join(values)}")
            image = values[self.data.image_column]
            name = image_name(f"file {stream} row {row}", image)
            load = lambda image=image: remote_bytes(image)  # noqa: E731
            if example := self.labels.example(name, values[self.data.label_column], load):
                yield example
