"""Class labels as people write them, ints and names, to class ids."""

import difflib
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Set
from typing import Any, NoReturn

import numpy as np
import torch


ClassLabels = int | str | Iterable[int | str] | torch.Tensor | np.ndarray


# An error lists the names of a class set if there are no more than this.
FEW_NAMES = 20

NUMBER = re.compile(r"\s*[+-]?\d[\d_]*(\.\d*)?(e[+-]?\d+)?\s*", re.IGNORECASE)


class ClassNames:
    """The names of a class set. A name may be a list of synonyms, separated by commas, as ImageNet's are.

    Args:
        id2label: class id to name; the ids may be strings, as JSON leaves them.
    """

    def __init__(self, id2label: Mapping[Any, str] | None):
        ids_by_name: dict[str, list[int]] = defaultdict(list)
        for class_id, names in (id2label or {}).items():
            # The whole string is a name too, beside its synonyms: "crane" alone may mean two classes, and only the
            # whole string tells the machine from the bird.
            for name in dict.fromkeys([names, *(part.strip() for part in names.split(","))]):
                ids_by_name[name].append(int(class_id))
        self.ids_by_name = dict(ids_by_name)

    @property
    def unambiguous(self) -> dict[str, int]:
        """Every single name that means one class, sorted, with its id."""
        return {name: ids[0] for name, ids in sorted(self.ids_by_name.items()) if len(ids) == 1 and "," not in name}

    def id_of(self, name: str) -> int:
        """The class id of a name.

        Raises:
            TypeError: it is no str.
            ValueError: no class has that name, or several have.
        """
        if not isinstance(name, str):
            raise TypeError(f"class name {name!r} is a {type(name).__name__}; expected a str")
        ids = self.ids_by_name.get(name, [])
        if len(ids) == 1:
            return ids[0]
        if ids:
            raise ValueError(f"class name {name!r} is ambiguous: ids {ids} share it; pass the id")
        if not self.ids_by_name:
            raise ValueError(f"class name {name!r} is unknown: this pipeline has no id2label; pass class ids")
        if NUMBER.fullmatch(name):
            self._explain_number(name.strip())
        close = closest_names(name, self.unambiguous)
        hint = f"did you mean {_alternatives(close)}?" if close else "pipe.labels lists the names"
        if not close and len(self.unambiguous) <= FEW_NAMES:
            hint = f"the names are {', '.join(map(repr, self.unambiguous))}"
        raise ValueError(f"class name {name!r} is unknown; {hint}")

    def _explain_number(self, number: str) -> NoReturn:
        """Raise ValueError for a number that is no class's name: an id is an int, of a range."""
        ids = sorted({class_id for ids in self.ids_by_name.values() for class_id in ids})
        hint = f"and no class has that id either: they are {ids[0]} to {ids[-1]}, passed as ints"
        if number.isdecimal() and int(number) in ids:
            hint = f"for the class id pass the int, {int(number)}"
        raise ValueError(f"class name {number!r} is unknown; {hint}")


def closest_names(name: str, names: Iterable[str], count: int = 5) -> list[str]:
    """The names, at most `count`, that share words with `name`; if none does, those of similar spelling.

    "dog" is close to "dog face" and "hot dog", whatever their lengths. A word of few names weighs more than one of
    many, so that "lion face" finds the lion before all faces. Numbers are close to nothing: 12 is not nearly 2.
    """
    words = {known: set(_words(known)) for known in names if not NUMBER.fullmatch(known)}
    frequency = Counter(word for those in words.values() for word in those)
    weights: dict[str, float] = {}
    for word in _words(name):
        weights |= {match: alike / frequency[match] for match, alike in _alike(word, frequency).items()}
    shared = {known: sum(weights.get(word, 0) for word in those) for known, those in words.items()}
    spelling = difflib.SequenceMatcher(b=name.lower(), autojunk=False)

    def order(known: str) -> tuple[float, bool, float, str]:
        spelling.set_seq1(known.lower())
        return -shared[known], not known.lower().startswith(name.lower()), -spelling.ratio(), known

    sharing = sorted((known for known in words if shared[known]), key=order)[:count]
    lowered = {known.lower(): known for known in words}
    return sharing or [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered)]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub("['\u2019]", "", text.lower()))


def _alike(word: str, vocabulary: Collection[str]) -> dict[str, float]:
    """Words that a word may stand for, with how much each counts: itself, else those that go on from it or are spelt
    much like it.
    """
    if word in vocabulary:
        return {word: 1.0}
    begun = {known: 0.5 for known in vocabulary if len(word) > 2 and known.startswith(word)}
    return dict.fromkeys(difflib.get_close_matches(word, vocabulary, cutoff=0.8), 0.5) | begun


def _alternatives(names: list[str]) -> str:
    """Names in quotes, as in "'a', 'b' or 'c'"."""
    *before, last = map(repr, names)
    return f"{', '.join(before)} or {last}" if before else last


def parse_class_labels(class_labels: ClassLabels, names: ClassNames, num_classes: int) -> list[int]:
    """Labels of any accepted form to a list of class ids in 0..num_classes-1.

    Raises:
        TypeError: a label is neither an int nor a str.
        ValueError: no labels, an unknown or ambiguous name, or an id outside the class set.
    """
    if isinstance(class_labels, torch.Tensor):
        if class_labels.is_floating_point() or class_labels.is_complex() or class_labels.dtype == torch.bool:
            raise TypeError(f"class_labels is a tensor of {class_labels.dtype}; expected integers")
        if class_labels.ndim > 1:
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; expected one label a sample, (B,)")
        class_labels = class_labels.reshape(-1).tolist()
    if isinstance(class_labels, np.ndarray):
        if class_labels.ndim > 1:
            raise ValueError(f"class_labels has shape {class_labels.shape}; expected one label a sample, (B,)")
        class_labels = class_labels.reshape(-1).tolist()
    if isinstance(class_labels, (Mapping, Set)):
        raise TypeError(f"class_labels is a {type(class_labels).__name__}, which says no order; pass list(...) of it")
    # A range, a pandas Series or a generator is as good as a list; bytes would be taken for class ids.
    is_list = isinstance(class_labels, Iterable) and not isinstance(class_labels, (str, bytes))
    given: list[Any] = list(class_labels) if is_list else [class_labels]  # type: ignore[arg-type]
    if not given:
        raise ValueError("class_labels is empty; pass at least one class id or name")

    ids = []
    for label in given:
        # To Python a bool is an int, and a numpy integer is not.
        if isinstance(label, bool) or not (isinstance(label, str) or hasattr(label, "__index__")):
            raise TypeError(f"class label {label!r} is a {type(label).__name__}; expected a class id or name")
        class_id = names.id_of(label) if isinstance(label, str) else int(label)
        if not 0 <= class_id < num_classes:
            raise ValueError(f"class label {label} is outside 0..{num_classes - 1}; {num_classes} is the null class")
        ids.append(class_id)
    return ids
