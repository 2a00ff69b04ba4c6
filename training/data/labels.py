"""Classes: which there are, in which order, and which one a label names."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np

from training.settings.config import ConfigError, require

from .examples import Example


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key under which "img2" stands before "img10"."""
    parts = re.split(r"(\d+)", text)
    return [(0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part]


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names with commas, at most a few and how many more."""
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def chosen_classes(wanted: Sequence[str], present: Sequence[str], where: str) -> list[str]:
    """`data.classes`, checked against the classes that are there.

    Raises:
        ConfigError: for names that are not.
    """
    missing = []
    folded = {name.strip().lower(): name for name in present}
    for name in (name for name in wanted if name not in present):
        close = difflib.get_close_matches(name.strip().lower(), folded, n=1)
        missing.append(f"{name} (did you mean {folded[close[0]]}?)" if close else name)
    require(
        not missing,
        f"data.classes names {listed(missing)}, which {where} does not have; it has {listed(present, 10) or 'none'}",
    )
    return list(wanted)


def without_images(labels: np.ndarray, classes: Sequence[str]) -> list[str]:
    """A warning, if some of the classes have no image."""
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    of = f"{len(empty)} of {len(classes)} classes"
    return [f"warning: {of} have no image, and the model cannot learn them: {listed(empty)}"] if empty else []


def label_value(value: Any) -> int | str | bool:
    """A value of a label column as the number or the name that it stands for.

    Raises:
        ValueError: if it stands for none: null, a negative number, no whole number, an empty text.
        ConfigError: if it is not one label, but a list for instance.
    """
    value = value.item() if isinstance(value, np.generic | np.ndarray) and value.size == 1 else value
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace").strip()
    if value is not None and not isinstance(value, bool | int | float | str):
        raise ConfigError(
            f"data.label_column holds {str(value)[:60]!r}, of type {type(value).__name__}; a number or name is needed"
        )
    if isinstance(value, float) and math.isfinite(value) and value.is_integer():
        value = int(value)
    is_none = value is None or isinstance(value, float) or isinstance(value, int) and value < 0
    is_none = is_none or isinstance(value, str) and (not value.strip() or bool(re.fullmatch(r"\s*-\d+\s*", value)))
    if is_none:
        raise ValueError(f"label {value!r} names no class")
    return value


class Labels:
    """Values of a label column to class indices.

    Args:
        feature: the column's feature; None if a stream does not tell.
        values: the whole column; None for streams, whose classes must then be known without reading it.
        classes: `data.classes`: for names (texts or a ClassLabel) the classes to use, in index order, images of
            others being left out; for plain whole numbers the names of 0, 1, 2, ...

    Raises:
        ConfigError: if `classes` does not fit what is known of the labels.
    """

    def __init__(self, feature: Any, values: Sequence[Any] | None, classes: Sequence[str] | None) -> None:
        self.names: list[str] | None = None  # what whole numbers mean
        self.left_out: Counter[str] = Counter()  # of classes that are not used
        self.numbered = False  # whether data.classes gives numbers their names
        present = None if values is None else distinct(values)
        if isinstance(feature, datasets.ClassLabel):
            self.names = list(feature.names)
            self.classes = self.names if classes is None else chosen_classes(classes, self.names, "the dataset")
        elif classes is not None:
            self.classes, self.numbered = list(classes), True
            self.names = bool_names(classes) or self.classes
            texts = sorted((value for value in present or () if isinstance(value, str)), key=natural_key)
            if texts:
                chosen_classes(classes, texts, "the label column")
            for value in present or ():
                self.number(value)
        else:
            require(
                present is not None,
                "a stream whose label column has no ClassLabel feature does not tell its classes: list them in "
                "data.classes",
            )
            self.classes = sorted(map(str, present or ()), key=natural_key)
        self.index = {name: label for label, name in enumerate(self.classes)}

    def number(self, value: int | str) -> None:
        """Refuse a whole number that `data.classes` does not name, or gives the name of another one.

        Raises:
            ConfigError: with the ways out.
        """
        if not self.numbered or isinstance(value, str):
            return
        count = len(self.classes)
        names = f"data.classes names the numbers 0 to {count - 1}, {count} in all"
        remedy = "If labels begin with 1, give 0 a name too; data.classes: null takes the numbers themselves as names"
        require(value < count, f"there is a label {value}, but {names}. {remedy}")
        misnamed = [f"{number} {name}" for number, name in enumerate(self.classes) if is_other_number(name, number)]
        require(
            not misnamed,
            f"labels are whole numbers, and {names}: it would call {listed(misnamed)}. Choosing among numbers is not "
            "possible; data.classes: null takes all, by their numbers",
        )

    def __call__(self, value: Any) -> int | None:
        """The class index; None: of a class that is not used.

        Raises:
            ValueError: if the value is no label.
            ConfigError: if it does not fit `data.classes`.
        """
        found = label_value(value)
        name = str(found)
        if isinstance(found, int) and self.names is not None:
            self.number(found)
            if found >= len(self.names):
                raise ValueError(f"label {found!r} names no class")
            name = self.names[found]
        label = self.index.get(name)
        if label is None:
            self.left_out[name] += 1
        return label

    def example(self, name: str, value: Any, load: Callable[[], Any]) -> Example | None:
        """The example of an image with this label; None if its class is not used."""
        try:
            label = self(value)
        except ConfigError:
            raise
        except ValueError as error:
            return Example(name, -1, load, str(error))
        return None if label is None else Example(name, label, load)


def distinct(values: Sequence[Any]) -> list[Any]:
    """The different labels of a column, those that name no class left out."""
    found: dict[Any, None] = {}
    for value in values:
        try:
            found[label_value(value)] = None
        except ConfigError:
            raise
        except ValueError:
            continue
    return list(found)


def bool_names(classes: Sequence[str]) -> list[str] | None:
    """For `data.classes` of true and false, whichever comes first: what 0 and 1 are called in it."""
    by_name = {name.lower(): name for name in classes}
    return [by_name["false"], by_name["true"]] if by_name.keys() == {"false", "true"} else None


def is_other_number(name: str, number: int) -> bool:
    return name.strip().isdecimal() and int(name) != number
