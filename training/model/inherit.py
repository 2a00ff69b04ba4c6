"""Weights from a trained model into a new one, tensor by tensor: copied, resized by a stated rule, or fresh.

Nothing is loaded with `strict=False`. Every tensor of the new model gets a row in a table, and a tensor whose shape
changed without a rule that explains it is an error, as is one the old model has and the new one lacks.

A rule belongs to a tensor's name and turns the old tensor into the new one's shape, or returns None for "leave the
fresh initialisation". To support another kind of change, add a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn


Rule = Callable[[Tensor, Tensor], Tensor | None]


@dataclass(frozen=True)
class Inherited:
    """How one tensor of the new model was filled."""

    name: str
    action: Literal["copied", "resized", "fresh"]
    old_shape: tuple[int, ...]
    new_shape: tuple[int, ...]


def fresh_projection(old: Tensor, new: Tensor) -> Tensor | None:
    """1-step -> MRAR: an image's tokens have C * p * p numbers instead of C; there is no trained weight for that."""
    return None


def repeat_mask_token(old: Tensor, new: Tensor) -> Tensor | None:
    """1-step -> MRAR: the single mask embedding (1, 1, D) stands at each of the S / N positions of group 0."""
    if old.shape[1] != 1 or old.shape[2] != new.shape[2]:
        raise ValueError(
            "only a single mask embedding can be repeated: start MRAR from a 1-step model of the same width; an MRAR "
            "model cannot become one of fewer images"
        )
    return old.expand_as(new).clone()


def interpolate_positions(old: Tensor, new: Tensor) -> Tensor | None:
    """256 -> 512 px: a square grid of positions (1, T, D), resampled bicubically, corners not aligned."""
    old_side, new_side = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
    if old_side**2 != old.shape[1] or new_side**2 != new.shape[1] or old.shape[2] != new.shape[2]:
        raise ValueError(
            f"positions {tuple(old.shape)} cannot become {tuple(new.shape)}: only the side of a square grid may "
            "change, not the width"
        )
    grid = old.transpose(1, 2).unflatten(-1, (old_side, old_side))
    grown = F.interpolate(grid.float(), size=(new_side, new_side), mode="bicubic", align_corners=False)
    return grown.flatten(2).transpose(1, 2)


ENCODER_RULES: dict[str, Rule] = {
    "reference_projection.weight": fresh_projection,
    "mask_token": repeat_mask_token,
}
DECODER_RULES: dict[str, Rule] = {"position_embedding": interpolate_positions}
# A tensor that keeps its shape, and the one whose change of shape makes it fresh as well: the bias of a layer is of no
# use beside a fresh weight.
FRESH_TOGETHER = {"reference_projection.bias": "reference_projection.weight"}


def inherit(
    model: nn.Module, source: Mapping[str, Tensor], rules: Mapping[str, Rule] = ENCODER_RULES
) -> list[Inherited]:
    """Fill `model` from the state dict `source`; returns one row per tensor.

    Raises:
        ValueError: if a tensor exists on one side only, or changed shape and no rule covers it.
    """
    target = model.state_dict()
    missing, leftover = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    if missing or leftover:
        raise ValueError(
            f"the models do not match: the old one lacks {missing[:5]}, the new one has no place for {leftover[:5]}; "
            "depth and layout must be the same"
        )
    rows, values = [], {}
    for name, new in target.items():
        old = source[name]
        action, values[name] = inherit_tensor(name, old, new, reshaped(name, source, target), rules)
        rows.append(Inherited(name, action, tuple(old.shape), tuple(new.shape)))
    model.load_state_dict(values)
    return rows


def reshaped(name: str, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> bool:
    """Whether a tensor, or the one it belongs to, changed shape."""
    leader = FRESH_TOGETHER.get(name, name)
    return source[leader].shape != target[leader].shape


def inherit_tensor(
    name: str, old: Tensor, new: Tensor, changed: bool, rules: Mapping[str, Rule]
) -> tuple[Literal["copied", "resized", "fresh"], Tensor]:
    if not changed:
        return "copied", old
    rule = rules.get(FRESH_TOGETHER.get(name, name))
    if rule is None:
        raise ValueError(
            f"{name} has shape {tuple(old.shape)} in the old model and {tuple(new.shape)} in the new one, and no rule "
            "says how to carry it over; use the old model's sizes"
        )
    value = rule(old, new)
    return ("fresh", new) if value is None else ("resized", value.to(new.dtype))


def table(rows: list[Inherited]) -> str:
    """The rows that changed, and how many were copied, for printing."""
    changed = [row for row in rows if row.action != "copied"]
    width = max([len(row.name) for row in changed], default=0)
    lines = [f"  {row.action:8} {row.name:{width}}  {row.old_shape} -> {row.new_shape}" for row in changed]
    return "\n".join([f"  copied   {len(rows) - len(changed)} of {len(rows)} tensors", *lines])
