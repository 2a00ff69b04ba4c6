"""The names of a model's classes, and another class set for it: embeddings kept where names agree, else fresh.

Classes are the condition encoder's, and pipelines may share it: `from_pipe`, `TransDiffPipeline(**pipe.components)`.
So the encoder remembers how they are called, and a pipeline follows when they are replaced through another one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch
from diffusers import ConfigMixin
from torch import nn

from ..models import ARConditionEncoder
from .class_labels import ClassNames


@dataclass(eq=False)
class ClassSet:
    """What pipelines know of an encoder's classes. It is replaced with them, so that a pipeline sees that they were.

    Attributes:
        id2label: the names that a pipeline gave last, None without any.
        recommended: the checkpoint's settings that came with them, by the names of the pipeline's arguments.
    """

    id2label: dict[int, str] | None = None
    recommended: dict[str, Any] = field(default_factory=dict)


def names_by_id(id2label: Mapping[Any, str] | Sequence[str]) -> dict[int, str]:
    """Class names by int id, of a mapping whose ids may be strings, as JSON leaves them, or of a list in order.

    Raises:
        TypeError: it is neither, an id is no whole number, or a name is no string.
        ValueError: an id is there twice.
    """
    if isinstance(id2label, (list, tuple)):
        id2label = dict(enumerate(id2label))
    if not isinstance(id2label, Mapping):
        raise TypeError(
            f"id2label is a {type(id2label).__name__}; expected a dict of class id to name, or a list of names"
        )
    names: dict[int, str] = {}
    for key, name in id2label.items():
        is_id = isinstance(key, Integral) or (isinstance(key, str) and key.strip().isdecimal())
        if isinstance(key, bool) or not is_id:
            raise TypeError(f"id2label has the id {key!r}; expected a whole number")
        if not isinstance(name, str):
            raise TypeError(f"id2label names class {key} {name!r}, a {type(name).__name__}; expected a str")
        if int(key) in names:
            raise ValueError(f"id2label has the id {int(key)} twice, as {names[int(key)]!r} and {name!r}")
        names[int(key)] = name
    return names


def check_names(id2label: Mapping[int, str] | None, encoder: Any) -> None:
    """Raise ValueError unless there is a name for each class of the encoder, and for no other."""
    num_classes = None if encoder is None else encoder.config.num_classes
    if id2label is None or num_classes is None or sorted(id2label) == list(range(num_classes)):
        return
    unnamed = sorted(set(range(num_classes)) - {*id2label})
    strange = [class_id for class_id in id2label if class_id >= num_classes] or unnamed
    raise ValueError(
        f"id2label names {len(id2label)} classes, but the condition encoder has {num_classes}, "
        f"0..{num_classes - 1}: "
        f"{'it has none' if strange[0] >= num_classes else 'there is no name'} for {strange[0]}. Give one name for "
        "each class, or None; resize_class_embeddings gives the encoder other classes"
    )


def match_classes(old: Mapping[int, str] | None, new: Mapping[int, str], num_old: int) -> list[int | None]:
    """For each class of `new`, in order of its id, the id in `old` of the class it is; None for a class of its own.

    Names agree if they are equal, or if one of their comma-separated synonyms is. Without `old` there are no names:
    class i then is class i, for i < `num_old`.

    Raises:
        ValueError: the ids of `new` are not 0..n-1, or a name means several of the old classes.
    """
    if sorted(new) != list(range(len(new))) or not new:
        raise ValueError(f"id2label has the ids {sorted(new)[:5]}...; expected 0..{max(len(new) - 1, 0)}, each once")
    if old is None:
        return [class_id if class_id < num_old else None for class_id in range(len(new))]
    names = ClassNames(old)
    return [_find(new[class_id], names) for class_id in range(len(new))]


def _find(label: str, names: ClassNames) -> int | None:
    exact = names.ids_by_name.get(label, [])
    if len(exact) == 1:
        return exact[0]
    synonyms = [part.strip() for part in label.split(",")]
    found = sorted({class_id for name in synonyms for class_id in names.ids_by_name.get(name, [])})
    if len(found) > 1:
        raise ValueError(f"class name {label!r} means several classes of the model, {found}; use the full name of one")
    return found[0] if found else None


@torch.no_grad()
def resize_class_embedding(encoder: ARConditionEncoder, sources: Sequence[int | None]) -> None:
    """Give `encoder` the classes 0..len(sources)-1: row `sources[i]` of its embedding each, the null class last.

    A class without a source starts from the mean of the old classes: a point where the trained network works, which
    a random vector of the initial length is not, and the same for all of them, so that nothing is drawn.
    """
    old = encoder.class_embedding
    if hasattr(old, "base_layer"):
        raise ValueError("the class embedding has a LoRA adapter; fuse_lora() and unload_lora_weights() first")
    rows, null = old.weight[:-1], old.weight[-1]
    mean = rows.float().mean(0).to(rows.dtype)
    weight = torch.stack([mean if source is None else rows[source] for source in sources] + [null])
    embedding = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
    encoder.class_embedding = embedding.train(old.training)
    encoder.null_class = len(sources)
    encoder.register_to_config(num_classes=len(sources))
    known = getattr(encoder, "_class_set", None) or ClassSet()
    encoder._class_set = ClassSet(recommended=known.recommended)


class ClassSetMixin(ConfigMixin):
    """The pipeline's own class set, and another one in its place."""

    condition_encoder: ARConditionEncoder
    _class_set: ClassSet | None = None

    def _register_class_set(self, id2label: Any, **recommended: Any) -> None:
        """Start with the names and the settings given, or else, for None, with those that the encoder came with."""
        encoder: Any = self.condition_encoder
        names = None if id2label is None else names_by_id(id2label)
        check_names(names, encoder)
        if encoder is not None:
            known = getattr(encoder, "_class_set", None) or ClassSet()
            known.id2label = names = known.id2label if names is None else names
            recommended = {
                name: known.recommended.get(name) if value is None else value for name, value in recommended.items()
            }
            known.recommended = recommended
            encoder._class_set = self._class_set = known
        self.register_to_config(id2label=names, **recommended)

    @property
    def config(self) -> Any:
        """The configuration, with the names of the encoder's classes as they are now."""
        encoder: Any = self.__dict__.get("condition_encoder")
        now = getattr(encoder, "_class_set", None)
        if now is not None and self._class_set is not None and now is not self._class_set:
            self.__dict__["_class_set"] = now  # not by the pipeline's `__setattr__`, which asks for the config
            self.register_to_config(id2label=now.id2label)
        return super().config

    @property
    def _class_names(self) -> ClassNames:
        """Raises ValueError where the names are not those of the encoder's classes: it was replaced, for one."""
        names = self.config.id2label
        check_names(names, self.condition_encoder)
        return ClassNames(names)

    @property
    def labels(self) -> dict[str, int]:
        """Every single name that means one class, sorted, with its id."""
        return self._class_names.unambiguous

    def resize_class_embeddings(self, id2label: Mapping[int, str] | Sequence[str]) -> list[int]:
        """Replace the classes of all pipelines with this encoder; the start of fine-tuning on other data.

        A class whose name, or one of its comma-separated synonyms, the pipeline knows keeps its embedding, whatever
        its new id. The others start from the mean of the old classes; so do all ids beyond the old ones in a pipeline
        that has no names, where a class is its id. The null class is kept.

        Args:
            id2label: the new classes, ids 0..n-1 to names, or a list of the names.

        Returns:
            The ids of the classes that are new.

        Raises:
            TypeError, ValueError: the ids are not 0..n-1, a name is no string or means several old classes, or the
                embedding has a LoRA adapter. Nothing is changed then.
        """
        if self.condition_encoder is None:
            raise ValueError("this pipeline has no condition_encoder, whose classes these would be")
        names = names_by_id(id2label)
        sources = match_classes(self.config.id2label, names, self.condition_encoder.config.num_classes)
        resize_class_embedding(self.condition_encoder, sources)
        self.condition_encoder._class_set.id2label = names
        return [class_id for class_id, source in enumerate(sources) if source is None]
