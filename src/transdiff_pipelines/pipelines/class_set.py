"""Another class set for a trained model: class embeddings kept where the names agree, fresh where they are new."""

from collections.abc import Mapping, Sequence

import torch
from diffusers import ConfigMixin
from torch import nn

from ..models import ARConditionEncoder
from .class_labels import ClassNames


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
    rows, null = old.weight[:-1], old.weight[-1]
    mean = rows.float().mean(0).to(rows.dtype)
    weight = torch.stack([mean if source is None else rows[source] for source in sources] + [null])
    embedding = nn.Embedding.from_pretrained(weight, freeze=not old.weight.requires_grad)
    encoder.class_embedding = embedding.train(old.training)
    encoder.null_class = len(sources)
    encoder.register_to_config(num_classes=len(sources))


class ClassSetMixin(ConfigMixin):
    """The pipeline's own class set, and another one in its place."""

    condition_encoder: ARConditionEncoder

    def _set_labels(self, id2label: Mapping[int, str] | None) -> None:
        self._class_names = ClassNames(id2label)
        self.labels = self._class_names.unambiguous

    def resize_class_embeddings(self, id2label: Mapping[int, str]) -> list[int]:
        """Replace the classes of the pipeline; the start of fine-tuning on other data.

        A class whose name, or one of its comma-separated synonyms, the pipeline knows keeps its embedding, whatever
        its new id. The others start from the mean of the old classes; so do all ids beyond the old ones in a pipeline
        that has no names, where a class is its id. The null class is kept.

        Args:
            id2label: the new classes, ids 0..n-1 to names.

        Returns:
            The ids of the classes that are new.

        Raises:
            ValueError: the ids are not 0..n-1, or a name means several old classes. Nothing is changed then.
        """
        id2label = {int(class_id): name for class_id, name in id2label.items()}
        sources = match_classes(self.config.id2label, id2label, self.condition_encoder.config.num_classes)
        resize_class_embedding(self.condition_encoder, sources)
        self.register_to_config(id2label=id2label)
        self._set_labels(id2label)
        return [class_id for class_id, source in enumerate(sources) if source is None]
