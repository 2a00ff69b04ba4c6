"""Renaming weights by a table that must account for every name on both sides."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


MAX_NAMES = 8
"""As many names as an error message lists."""


@dataclass(frozen=True)
class KeyRow:
    """One row of a key table: released tensors to tensors here.

    The `sources` are concatenated along their first dimension (usually there is one) and cut into as many equal parts
    as there are `targets`. With `pointwise`, 1 x 1 convolutions `(out, in, 1, 1)` become linears `(out, in)`.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    pointwise: bool = False

    def source_shape(self, weights: Mapping[str, torch.Tensor], source: str) -> tuple[int, ...]:
        shape = tuple(weights[source].shape)
        return shape[:2] if self.pointwise and len(shape) == 4 and shape[2:] == (1, 1) else shape

    def fits(self, weights: Mapping[str, torch.Tensor], target_shape: tuple[int, ...]) -> bool:
        """Whether the sources, concatenated and cut, have the shape of the targets (all targets share one)."""
        shapes = [self.source_shape(weights, source) for source in self.sources]
        rows = sum(size for shape in shapes for size in shape[:1])
        return rows == len(self.targets) * target_shape[0] and all(shape[1:] == target_shape[1:] for shape in shapes)

    def convert(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = [weights[source].detach().reshape(self.source_shape(weights, source)) for source in self.sources]
        parts = (
            torch.cat(tensors).chunk(len(self.targets)) if len(tensors) > 1 else tensors[0].chunk(len(self.targets))
        )
        return dict(zip(self.targets, parts, strict=True))


def module_rows(source: str, *targets: str, pointwise: bool = False) -> list[KeyRow]:
    """The rows of a module's weight and bias."""
    return [
        KeyRow((f"{source}.{name}",), tuple(f"{target}.{name}" for target in targets), pointwise and name == "weight")
        for name in ("weight", "bias")
    ]


def count_blocks(weights: Mapping[str, torch.Tensor], prefix: str) -> int:
    """How many of `{prefix}.0.`, `{prefix}.1.`, ... there are, in one run from 0; at least 1, so that 0 is missed."""
    number = 0
    while any(name.startswith(f"{prefix}.{number}.") for name in weights):
        number += 1
    return max(number, 1)


def dimension(weights: Mapping[str, torch.Tensor], name: str, index: int) -> int:
    """The length of one dimension of a released tensor, from which configuration is read."""
    shape = tuple(weights[name].shape)
    if index >= len(shape):
        raise ValueError(f"{name} has shape {shape}; expected {index + 1} or more dimensions")
    return shape[index]


def check_names(weights: Mapping[str, torch.Tensor], rows: Iterable[KeyRow], path: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless the checkpoint has the table's released names, all of them and no others."""
    known = {source for row in rows for source in row.sources}
    complaints = [
        f"{len(names)} {kind}: {_listed(names)}"
        for kind, names in (("missing", known - weights.keys()), ("unknown", weights.keys() - known))
        if names
    ]
    if complaints:
        raise ValueError(f"{path} does not have the released weights' names; {'; '.join(complaints)}")


def convert_weights(
    weights: Mapping[str, torch.Tensor],
    rows: Iterable[KeyRow],
    target_shapes: Mapping[str, tuple[int, ...]],
    path: str | os.PathLike[str],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Released weights, whose names `check_names` has passed, as copies in `dtype` under the names of `target_shapes`.

    Raises:
        ValueError: a released tensor has another shape than its targets need, or the table's targets are not exactly
            the names of `target_shapes`.
    """
    rows = list(rows)
    converted_names = {target for row in rows for target in row.targets}
    if leftover := converted_names ^ target_shapes.keys():
        raise ValueError(f"{path} does not describe a whole model: lacking or left over are {_listed(leftover)}")
    wrong = [
        f"{source} {tuple(weights[source].shape)}"
        for row in rows
        if not row.fits(weights, target_shapes[row.targets[0]])
        for source in row.sources
    ]
    if wrong:
        raise ValueError(f"{path} has {len(wrong)} weights whose shape contradicts the others: {_listed(wrong)}")
    # Copies: the originals are mapped from a file that may be deleted or overwritten later.
    return {name: tensor.to(dtype, copy=True) for row in rows for name, tensor in row.convert(weights).items()}


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - MAX_NAMES} more" if len(ordered) > MAX_NAMES else ""
    return ", ".join(ordered[:MAX_NAMES]) + more
