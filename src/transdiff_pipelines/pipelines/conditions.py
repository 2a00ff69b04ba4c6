"""What the images of an AR sequence are conditioned on: labels, or tokens that the caller made.

Both sources answer `extend(images)`, the condition of the next image after those made since the last answer.

Shapes: B images, G guidance branches (1, or 2 with the unconditional one first), N images in a sequence of S / N
tokens each, M condition tokens, D condition width, C latent channels, s latent side.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import maybe_mark_dynamic

from ..models import ARConditionEncoder
from ..models.key_value_cache import KeyValue, KeyValueCache


# Condition tokens, or the keys and values that the transformer's blocks made of them.
Condition = torch.Tensor | list[KeyValue]

# Condition tokens of B images, or a function of the B images made so far `(B, i, C, s, s)`, None for the first.
ConditionEmbeds = torch.Tensor | Callable[[torch.Tensor | None], torch.Tensor]


@dataclass(frozen=True)
class BoundEncoder:
    """The condition encoder with all that stays the same during a call.

    Attributes:
        model: the condition encoder.
        device: where it is run; with offloading its weights are elsewhere until then.
        dtype, width: those of the condition, which are the transformer's.
        attention_kwargs: those of the call.
    """

    model: ARConditionEncoder
    device: torch.device
    dtype: torch.dtype
    width: int
    attention_kwargs: dict[str, Any] | None = None

    def __call__(
        self, class_labels: torch.Tensor, images: torch.Tensor | None, cache: list[KeyValueCache] | None = None
    ) -> torch.Tensor:
        """Condition tokens `(B, M, D)` of class ids `(B,)` and earlier images `(B, n, C, s, s)`, or None."""
        options = {"attention_kwargs": self.attention_kwargs, "cache": cache, "return_dict": False}
        condition: torch.Tensor = self.model(class_labels, images, **options)[0]
        return condition.to(self.dtype)


class LabelCondition:
    """Condition tokens of labels, one group longer with every image: the encoder sees each group once.

    Equal labels have equal conditions until images come in, so the first group is encoded once for each label, and
    the null class once for the whole batch. The unconditional branch differs in the class alone: it sees the same
    images.

    Args:
        encode: the condition encoder.
        labels: class ids, one for each image.
        guided: whether there is an unconditional branch.
        num_images: images of the sequence, those given as references counted.
    """

    def __init__(self, encode: BoundEncoder, labels: Sequence[int], guided: bool, num_images: int):
        self.batch_size = len(labels)
        self._encode = encode
        self._rows = [encode.model.null_class] * len(labels) + list(labels) if guided else list(labels)
        self._labels = torch.tensor(self._rows, device=encode.device)
        self._branches = 2 if guided else 1
        self._images_left = num_images
        self._cache = encode.model.new_cache() if encode.model.num_images > 1 else None
        self._tokens: torch.Tensor | None = None

    def extend(self, images: torch.Tensor | None = None) -> torch.Tensor:
        """Condition `(G B, (i + 1) S / N, D)` of image i, from the images not yet seen `(B, n, C, s, s)`, or None."""
        tokens = self._encode_labels() if self._tokens is None else self._tokens
        if images is not None:
            group = self._encode(self._labels, torch.cat([images] * self._branches), self._cache)
            tokens = torch.cat([tokens, group], dim=1)
            self._images_left -= images.shape[1]
        self._tokens = tokens
        if self._images_left == 1:
            # The encoder is not called after the last image, so its keys and values are dropped before that image is
            # made and decoded, when memory is needed most.
            self._cache = self._tokens = None
        return tokens

    def _encode_labels(self) -> torch.Tensor:
        """Condition `(G B, S / N, D)` of the first image, from one row for each distinct label."""
        distinct = list(dict.fromkeys(self._rows))
        distinct_labels = torch.tensor(distinct, device=self._encode.device)
        row_of = torch.tensor([distinct.index(label) for label in self._rows], device=self._encode.device)
        # The number of distinct labels changes from call to call, and the length of the past from image to image. A
        # compiled encoder is told, so that it does not recompile to find out.
        maybe_mark_dynamic(distinct_labels, 0)
        condition = self._encode(distinct_labels, None, self._cache)[row_of]
        for layer in self._cache or []:
            layer.select_rows(row_of)
            for states in layer.key_value or ():
                maybe_mark_dynamic(states, 1)
        return condition


class GivenCondition:
    """A condition that the caller made: tokens, or a function that makes them for each image of the sequence.

    Args:
        encode: the condition encoder.
        given: tokens, or the function.
        negative: the same for the unconditional branch; None encodes the null class with the same images.
        guided: whether there is an unconditional branch.
        repeats: how many images each row stands for.

    Attributes:
        batch_size: B, the images that the rows of the condition stand for.
    """

    def __init__(
        self,
        encode: BoundEncoder,
        given: ConditionEmbeds,
        negative: ConditionEmbeds | None,
        guided: bool,
        repeats: int,
    ):
        self._encode, self._given, self._negative = encode, given, negative
        self._guided, self._repeats = guided, repeats
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

    def _unconditional(self, rows: torch.Tensor) -> torch.Tensor:
        """The other branch, `(B, M, D)` like `rows`; of a condition cut short, the null class is cut alike."""
        if self._negative is not None:
            negative = self._make("negative_condition_embeds", self._negative)
        else:
            negative = self._encode_null_class()[:, : rows.shape[1]]
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

    def _encode_null_class(self) -> torch.Tensor:
        """Condition `(B, M, D)` of the null class with the images so far, `(1, M, D)` before there are any."""
        null = torch.tensor([self._encode.model.null_class], device=self._encode.device)
        return self._encode(null if self._seen is None else null.expand(len(self._seen)), self._seen)

    def _make(self, name: str, given: ConditionEmbeds) -> torch.Tensor:
        tokens = given if isinstance(given, torch.Tensor) else given(self._seen)
        return check_condition(name, tokens, self._encode.width).to(self._encode.device, self._encode.dtype)


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
