"""The condition of an AR sequence, encoded group by group as its images are made.

Shapes: B images, G guidance branches (1, or 2 with the unconditional one first), N images in a sequence of S / N
tokens each, D condition width, C latent channels, s latent side.
"""

from collections.abc import Callable

import torch

from ..models import ARConditionEncoder
from ..models.key_value_cache import KeyValue


# Condition tokens, or the keys and values that the transformer's blocks made of them.
Condition = torch.Tensor | list[KeyValue]


class SequenceCondition:
    """Condition tokens of B sequences, one group longer with every image: the encoder sees each group once.

    Equal labels have equal conditions until images come in, so the first group is encoded once for each label, and
    the null class once for the whole batch. The unconditional branch differs in the class alone: it sees the same
    images.

    Args:
        encode: `TransDiffPipeline.encode_condition`.
        encoder: the condition encoder it calls.
        labels: class ids, one for each image.
        guided: whether there is an unconditional branch.
        device: where the condition is made.
    """

    def __init__(
        self,
        encode: Callable[..., torch.Tensor],
        encoder: ARConditionEncoder,
        labels: list[int],
        guided: bool,
        device: torch.device,
    ):
        rows = [encoder.null_class] * len(labels) + labels if guided else labels
        self._encode = encode
        self._labels = torch.tensor(rows, device=device)
        self._branches = 2 if guided else 1
        distinct = list(dict.fromkeys(rows))
        self._distinct_labels = torch.tensor(distinct, device=device)
        self._row_of = torch.tensor([distinct.index(label) for label in rows], device=device)
        self._cache = encoder.new_cache() if encoder.num_images > 1 else None
        self.tokens: torch.Tensor | None = None

    def extend(self, image: torch.Tensor | None = None) -> torch.Tensor:
        """Condition `(G B, (i + 1) * S / N, D)` of image i, from image i - 1 `(B, C, s, s)`; None for the first."""
        if image is None:
            condition = self._encode(self._distinct_labels, cache=self._cache)[self._row_of]
            for layer in self._cache or []:
                layer.select_rows(self._row_of)
            self.tokens = condition
        else:
            references = torch.cat([image.unsqueeze(1)] * self._branches)
            group = self._encode(self._labels, references, cache=self._cache)
            self.tokens = torch.cat([self.tokens, group], dim=1)
        return self.tokens


def conditional_half(condition: Condition, batch_size: int) -> Condition:
    """The last `batch_size` rows of a condition: what is left of `[unconditional, conditional]` without guidance."""
    if isinstance(condition, torch.Tensor):
        return condition[-batch_size:]
    return [(key[-batch_size:], value[-batch_size:]) for key, value in condition]
