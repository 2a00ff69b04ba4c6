"""What label columns may hold: numbers, names, and what stands for none; and `data.classes` against all of them."""

import math
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from training.cache_latents import cache_latents, report
from training.data.errors import DataError
from training.data.image_dataset import ImageData
from training.data.labels import label_value, without_images
from training.data.sources import Source, TableSource, open_source
from training.data.vae import load_vae
from training.settings.config import ConfigError, DataConfig
from training.train import Trainer


VALUE = datasets.Value


@pytest.fixture
def data(vae, tmp_path) -> DataConfig:
    return DataConfig(vae=str(vae), cache=str(tmp_path / "cache"), image_size=16, mirror=False)


def source(labels: list[Any], feature: Any, classes: list[str] | None = None) -> Source:
    features = datasets.Features(image=datasets.Image(), label=feature)
    images = [Image.new("L", (16, 16), index) for index in range(len(labels))]
    table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
    return open_source(DataConfig(cache="c", classes=classes), table)


def stream(labels: list[Any], classes: list[str]) -> Source:
    def rows(part: tuple[int, ...]) -> Iterator[dict]:
        for index in part:
            yield {"image": Image.new("L", (16, 16), index), "label": labels[index]}

    made = datasets.IterableDataset.from_generator(rows, gen_kwargs={"part": tuple(range(len(labels)))})
    return open_source(DataConfig(cache="c", classes=classes), made)


def names(found: Source) -> list[str | None]:
    """The class of each image that is not left out; None where its label names none."""
    return [None if example.problem else found.classes[example.label] for example in found.examples(0)]


@pytest.mark.parametrize(
    ("labels", "feature", "expected"),
    [
        ([0, -1, 1, 2], VALUE("int64"), ["0", None, "1", "2"]),
        ([0, -100, None, 2], VALUE("int32"), ["0", None, None, "2"]),
        ([1.0, 2.0, math.nan, None], VALUE("float64"), ["1", "2", None, None]),
        ([1.0, -1.0, 0.5, math.inf], VALUE("float32"), ["1", None, None, None]),
        ([True, False, None], VALUE("bool"), ["True", "False", None]),
        (["a", "", "  ", None, "b"], VALUE("string"), ["a", None, None, None, "b"]),
        (["1", "-1", "2", " -1 "], VALUE("string"), ["1", None, "2", None]),
        (["none", "nan", "null", "None"], VALUE("string"), ["none", "nan", "null", "None"]),  # words may be names
        ([b"3", b"4\n"], VALUE("binary"), ["3", "4"]),
        ([255, 1], VALUE("uint8"), ["255", "1"]),
        ([-1, 0, None], datasets.ClassLabel(names=["cat", "dog"]), [None, "cat", None]),
    ],
)
def test_what_stands_for_no_label_is_skipped_and_makes_no_class(labels, feature, expected) -> None:
    found = source(labels, feature)
    assert names(found) == expected
    assert set(found.classes) - {"dog"} == {name for name in expected if name is not None}


def test_numbers_of_numpy_and_single_elements_are_numbers() -> None:
    for value in (np.int64(3), np.float32(3.0), np.array(3), np.array([3])):
        assert label_value(value) == 3
    assert names(stream([np.int64(1), np.int64(0), np.int64(-1)], ["cat", "dog"])) == ["dog", "cat", None]


@pytest.mark.parametrize("labels", [[[0, 1], [1]], [{"a": 1}, {"a": 2}]])
def test_several_labels_an_image_are_an_error(labels: list) -> None:
    feature = datasets.List(VALUE("int64")) if isinstance(labels[0], list) else {"a": VALUE("int64")}
    with pytest.raises(ConfigError, match="data.label_column holds .*a number or name is needed"):
        source(labels, feature)


@pytest.mark.parametrize("labels", [[-1, -1], [None, None]])
def test_a_column_without_a_label_is_an_error_at_once(labels: list) -> None:
    with pytest.raises(DataError, match=f"none of the 2 images has a label .*: label {labels[0]} names no class"):
        source(labels, VALUE("int64"))


# --- data.classes ---


@pytest.mark.parametrize(
    ("labels", "feature", "classes", "words"),
    [
        (["cat", "dog"], VALUE("string"), ["cat", "dgo"], r"names dgo \(did you mean dog\?\), which .* has cat, dog"),
        (["cat", "dog"], VALUE("string"), ["Cat", "dog"], r"names Cat \(did you mean cat\?\)"),
        (["cat", "dog"], VALUE("string"), ["cat ", "dog"], r"names cat  \(did you mean cat\?\)"),
        ([0, 1], datasets.ClassLabel(names=["cat", "dog"]), ["dog", "bird"], "names bird"),
        ([0, 1], datasets.ClassLabel(num_classes=2), ["cat", "dog"], "names cat, dog, which .* has 0, 1"),
        (["0", "1"], VALUE("string"), ["cat", "dog"], "names cat, dog, which .* has 0, 1"),
        ([1, 2, 3], VALUE("int64"), ["a", "b", "c"], r"a label 3, but .* the numbers 0 to 2.*begin with 1"),
        ([1.0, 2.0], VALUE("float64"), ["a", "b"], "a label 2, but"),
        ([0, 1, 7], VALUE("int64"), ["a", "b"], "a label 7, but"),
        ([1, 2], VALUE("int64"), ["1", "2"], "would call 0 1, 1 2"),
        ([0, 1], VALUE("int64"), ["1", "0"], r"would call 0 1, 1 0"),
        ([0, 1, 2], VALUE("int64"), ["0", "2", "x"], "would call 1 2"),
    ],
)
def test_a_class_list_that_does_not_fit_the_column_is_refused(labels, feature, classes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        source(labels, feature, classes)


@pytest.mark.parametrize(
    ("labels", "feature", "classes", "expected"),
    [
        (["b", "a", "c"], VALUE("string"), ["c", "a"], ["a", "c"]),
        (["1", "0", "2"], VALUE("string"), ["2", "1"], ["1", "2"]),
        ([0, 1], datasets.ClassLabel(names=["cat", "dog"]), ["dog", "cat"], ["cat", "dog"]),
        ([0, 1, -1], VALUE("int64"), ["cat", "dog"], ["cat", "dog", None]),
        ([1.0, 0.0, math.nan], VALUE("float64"), ["cat", "dog"], ["dog", "cat", None]),
        ([1, 0], VALUE("int64"), ["0", "1"], ["1", "0"]),
        ([True, False], VALUE("bool"), ["bad", "good"], ["good", "bad"]),
        ([True, False], VALUE("bool"), ["true", "false"], ["true", "false"]),
    ],
)
def test_a_class_list_that_fits(labels, feature, classes, expected) -> None:
    found = source(labels, feature, classes)
    assert found.classes == classes
    assert names(found) == expected


def test_images_that_a_class_list_leaves_out_are_told_of() -> None:
    found = source(["cat", "dog", "ant", "dog"], VALUE("string"), ["cat"])
    assert found.notes == ["left out 3 image(s) of classes that data.classes does not name: ant, dog"]
    assert source(["cat"], VALUE("string"), ["cat"]).notes == []


def test_a_stream_that_does_not_fit_a_class_list_stops_or_says_so() -> None:
    with pytest.raises(ConfigError, match="a label 2, but"):
        names(stream([1, 2], ["a", "b"]))
    with pytest.raises(ConfigError, match="would call 0 1"):
        names(stream([1, 0], ["1", "0"]))
    found = stream(["cat", "dog"], ["cat", "dgo"])
    assert names(found) == ["cat"]
    assert found.notes == ["left out images of classes that data.classes does not name: dog"]


# --- classes without images ---


def test_classes_without_images_are_listed() -> None:
    (line,) = without_images(np.array([0, 0, 2]), list("abcdefghi"))
    assert line.startswith("warning: 7 of 9 classes have no image")
    assert line.endswith("b, d, e, f, g, and 2 more")
    assert without_images(np.array([1, 0]), ["a", "b"]) == []


def test_a_class_without_images_is_told_of_by_the_cache_and_by_training(data, make_config, tmp_path, capsys) -> None:
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog", "ant"]))
    rows = {"image": [Image.new("L", (16, 16), index) for index in range(4)], "label": [0, 2, 2, -1]}
    table = datasets.Dataset.from_dict(rows, features=features)
    warning = "warning: 1 of 3 classes have no image, and the model cannot learn them: dog"
    assert warning in report(cache_latents(data, table))
    capsys.readouterr()
    Trainer(make_config(**{"data.cache": data.cache, "data.mirror": False}))
    assert warning in capsys.readouterr().out
    table.save_to_disk(tmp_path / "saved")
    Trainer(make_config(**{"data.cache": None, "data.dataset": str(tmp_path / "saved")}))
    assert warning in capsys.readouterr().out
    assert ImageData(TableSource(table, data), load_vae(data.vae), data).labels.tolist() == [0, 2, 2]


def test_a_folder_whose_images_are_all_bad_is_a_class_without_images(data, tmp_path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("L", (16, 16)).save(tmp_path / "images" / name / "0.png")
    (tmp_path / "images" / "dog" / "0.png").write_bytes(b"")
    found = report(cache_latents(DataConfig(**(vars(data) | {"images": str(tmp_path / "images")}))))
    assert "warning: 1 of 2 classes have no image, and the model cannot learn them: dog" in found
