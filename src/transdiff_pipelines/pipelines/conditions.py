"""The condition of an AR sequence, encoded group by group as its images are made.

Shapes: B images, G guidance branches (1, or 2 with the unconditional one first), N images in a sequence of S / N
tokens each, D condition width, C latent channels, s latent side.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch._dynamo import maybe_mark_dynamic

from ..models import ARConditionEncoder
from ..models.key_value_cache import KeyValue


# Condition tokens, or the keys and values that the transformer's blocks made of them.
Condition = torch.Tensor | list[KeyValue]


# Condition tokens of B images, or a function of the B images made so far `(B, i, C, s, s)`, None for the first.
ConditionEmbeds = torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor]


class ConditionSource(Protocol):
    """What `TransDiffPipeline` asks for the condition of each image of a sequence."""

    batch_size: int

    def extend(self, images: torch.Tensor | None = None) -> torch.Tensor:
        """Condition of the next image, `(G B, M, D)`, from the images not yet seen `(B, n, C, s, s)`, or None."""
        ...

    def finish(self) -> None:
        """Let go of what only a further image would need."""
        ...


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
        self.batch_size = len(labels)
        rows = [encoder.null_class] * len(labels) + labels if guided else labels
        self._encode = encode
        self._labels = torch.tensor(rows, device=device)
        self._branches = 2 if guided else 1
        distinct = list(dict.fromkeys(rows))
        self._distinct_labels = torch.tensor(distinct, device=device)
        self._row_of = torch.tensor([distinct.index(label) for label in rows], device=device)
        self._cache = encoder.new_cache() if encoder.num_images > 1 else None
        self.tokens: torch.Tensor | None = None

    def extend(self, images: torch.Tensor | None = None) -> torch.Tensor:
        """Condition `(G B, (i + 1) * S / N, D)` of image i, from the unseen ones `(B, n, C, s, s)`; at first None."""
        if images is None:
            # A compiled encoder need not find out by recompiling: how many labels differ, and how long the past is.
            maybe_mark_dynamic(self._distinct_labels, 0)
            condition = self._encode(self._distinct_labels, cache=self._cache)[self._row_of]
            for layer in self._cache or []:
                layer.select_rows(self._row_of)
                for states in layer.key_value or ():
                    maybe_mark_dynamic(states, 1)
            self.tokens = condition
        else:
            group = self._encode(self._labels, torch.cat([images] * self._branches), cache=self._cache)
            self.tokens = group if self.tokens is None else torch.cat([self.tokens, group], dim=1)
        return self.tokens

    def finish(self) -> None:
        """The encoder's keys and values need not be kept while the last image is made and decoded."""
        self._cache = self.tokens = None


class GivenCondition:
    """A condition that the caller made: tokens, or a function that makes them for each image of the sequence.

    Args:
        given: tokens, or the function.
        negative: the same for the unconditional branch; None encodes the null class with the same images.
        encode: `TransDiffPipeline.encode_condition`.
        encoder: the condition encoder it calls.
        guided: whether there is an unconditional branch.
        repeats: how many images each row stands for.
        device, dtype: those that the condition shall have.

    Attributes:
        batch_size: B, the images that the rows of the condition stand for.
    """

    def __init__(
        self,
        given: ConditionEmbeds,
        negative: ConditionEmbeds | None,
        encode: Callable[..., torch.Tensor],
        encoder: ARConditionEncoder,
        guided: bool,
        repeats: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._given, self._negative, self._encode = given, negative, encode
        self._guided, self._repeats, self._device, self._dtype = guided, repeats, device, dtype
        self._null_class = encoder.null_class
        self._width = encoder.config.num_attention_heads * encoder.config.attention_head_dim
        self._seen: torch.Tensor | None = None
        self._rows = self._make("condition_embeds", given)
        self.batch_size = len(self._rows) * repeats

    def extend(self, images: torch.Tensor | None = None) -> torch.Tensor:
        """Condition `(G B, M, D)` of the next image, from the images not yet seen `(B, n, C, s, s)`, or None."""
        if images is not None:
            self._seen = images if self._seen is None else torch.cat([self._seen, images], dim=1)
            self._rows, self._repeats = self._make("condition_embeds", self._given), 1
        rows = self._rows.repeat_interleave(self._repeats, dim=0)
        if len(rows) != self.batch_size:
            raise ValueError(f"condition_embeds made {len(rows)} rows for {self.batch_size} images; expected one each")
        return torch.cat([self._unconditional(rows), rows]) if self._guided else rows

    def finish(self) -> None:
        """The rows are the caller's; nothing else is kept."""

    def _unconditional(self, rows: torch.Tensor) -> torch.Tensor:
        """The other branch, `(B, M, D)` like `rows`; of a condition cut short, the null class is cut alike."""
        if self._negative is not None:
            negative = self._make("negative_condition_embeds", self._negative)
        else:
            null = torch.tensor([self._null_class], device=self._device)
            negative = self._encode(null, self._seen)[:, : rows.shape[1]]
        if negative.shape[1] != rows.shape[1]:
            raise ValueError(
                f"the unconditional branch has {negative.shape[1]} tokens and condition_embeds {rows.shape[1]}: pass "
                "negative_condition_embeds of as many tokens, made from the same reference images"
            )
        if len(negative) not in (1, len(rows)):
            negative = negative.repeat_interleave(self._repeats, dim=0)
        if len(negative) not in (1, len(rows)):
            raise ValueError(
                f"negative_condition_embeds has {len(negative)} rows for {len(rows)} images; expected one for all or "
                "one for each"
            )
        return negative.expand(len(rows), -1, -1)

    def _make(self, name: str, given: ConditionEmbeds) -> torch.Tensor:
        tokens = given if isinstance(given, torch.Tensor) else given(self._seen)
        return check_condition(name, tokens, self._width).to(self._device, self._dtype)


def check_sequence_arguments(
    class_labels: object, condition_embeds: object, negative_condition_embeds: object, reference_images: object
) -> None:
    """Raise ValueError for arguments of a call that exclude each other, or that do not stand alone."""
    if condition_embeds is None:
        if negative_condition_embeds is not None:
            raise ValueError("negative_condition_embeds was given without condition_embeds; pass both, or labels")
        return
    if class_labels is not None:
        raise ValueError("class_labels and condition_embeds were both given; pass one of them")
    if reference_images is not None and not callable(condition_embeds):
        raise ValueError(
            "reference_images and condition_embeds were both given; tokens hold their references already: pass them "
            "to encode_condition, or make condition_embeds a function of the images so far"
        )


def check_condition(name: str, tokens: torch.Tensor, width: int) -> torch.Tensor:
    """The tokens, if they are `(B, M, D)` floats with D = `width`.

    Raises:
        TypeError: they are no tensor of floats.
        ValueError: another shape.
    """
    if not isinstance(tokens, torch.Tensor) or not tokens.is_floating_point():
        kind = tokens.dtype if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise TypeError(f"{name} is {kind}; expected condition tokens, from encode_condition or a function of images")
    if tokens.ndim != 3 or tokens.shape[-1] != width or 0 in tokens.shape:
        raise ValueError(f"{name} has shape {tuple(tokens.shape)}; expected (B, M, {width}), tokens of B images")
    return tokens


def conditional_half(condition: Condition, batch_size: int) -> Condition:
    """The last `batch_size` rows of a condition: what is left of `[unconditional, conditional]` without guidance."""
    if isinstance(condition, torch.Tensor):
        return condition[-batch_size:]
    return [(key[-batch_size:], value[-batch_size:]) for key, value in condition]
