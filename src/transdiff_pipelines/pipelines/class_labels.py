"""Class labels as people write them, ints and names, to class ids."""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Set
from typing import Any, NoReturn

import numpy as np
import torch


ClassLabels = int | str | Iterable[int | str] | torch.Tensor | np.ndarray


# An error lists the names of a class set if there are no more than this.
FEW_NAMES = 20


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
        lowered = {known.lower(): known for known in self.unambiguous}
        if name.strip().isdecimal():
            self._explain_number(name)
        close = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "pipe.labels lists the names"
        if not close and len(self.unambiguous) <= FEW_NAMES:
            hint = f"the names are {', '.join(map(repr, self.unambiguous))}"
        raise ValueError(f"class name {name!r} is unknown; {hint}")

    def _explain_number(self, name: str) -> NoReturn:
        """Raise ValueError for digits that are no class's name: an id is an int."""
        ids = sorted({class_id for ids in self.ids_by_name.values() for class_id in ids})
        hint = f"for the class id pass the int, {int(name)}"
        if int(name) not in ids:
            hint = f"and no class has that id either: they are {ids[0]} to {ids[-1]}, passed as ints"
        raise ValueError(f"class name {name!r} is unknown; {hint}")


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
