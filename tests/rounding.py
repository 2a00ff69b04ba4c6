"""Equality up to rounding, and a rounding that differs from shape to shape as it does between processors.

The width of a processor's vectors, the number of threads and the shapes of the operands decide in which order a sum
is taken, and so its last bits. Two ways to compute the same numbers therefore share

- every bit (`torch.equal`) if they are the same operations in the same order on the same shapes;
- else what `assert_close` here allows, or in float64 what `torch.testing.assert_close` does: 1e-7 of float64 is wide.
"""

import zlib
from collections.abc import Callable

import torch
import torch.nn.functional as F


ROUNDINGS = 2000
"""A sum of n products rounds to within n eps of what it sums, and a call of a tiny pipeline puts some forty sums of up
to 64 products one after the other: 2560 eps at the very worst. Measured are less than 100."""


def assert_close(found: torch.Tensor, expected: torch.Tensor, roundings: int = ROUNDINGS) -> None:
    """No element is off by more than `roundings` eps of the largest value expected.

    Of the largest, because a small element is the difference of large ones, whose rounding it keeps: a tolerance
    relative to each element, as `torch.testing.assert_close` has, is too narrow for those.
    """
    atol = roundings * torch.finfo(expected.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


CURVE = 1e-3
"""Relative difference of the losses of short runs that are one but for rounding. AdamW divides a gradient by its own
size: what is hardly more than rounding moves a weight as far as any other, so differences grow from step to step."""


def assert_trained_alike(found: torch.Tensor, expected: torch.Tensor, name: str = "") -> None:
    """The weights of two such runs, as a whole: of single ones AdamW makes too much, see `CURVE`."""
    difference = (found - expected).norm().item()
    assert difference <= 5e-3 * expected.norm().item(), f"{name} is off by {difference / expected.norm().item():.1e}"


def vary_rounding(roundings: float) -> None:
    """From now on let float32 sums be off by up to so many eps, each shape of operands in its own way.

    That is how other processors differ from this one, a little exaggerated, whatever this one is. The same operation
    on the same shapes still gives the same bits.
    """
    for name in ("linear", "conv2d", "scaled_dot_product_attention", "layer_norm", "group_norm"):
        setattr(F, name, _varied(getattr(F, name), name, roundings))


def _varied(function: Callable[..., torch.Tensor], name: str, roundings: float) -> Callable[..., torch.Tensor]:
    factors: dict[tuple, torch.Tensor] = {}

    def varied(*arguments, **options) -> torch.Tensor:
        result = function(*arguments, **options)
        if torch.compiler.is_compiling() or result.dtype != torch.float32 or result.device.type != "cpu":
            return result
        shapes = tuple(tuple(value.shape) for value in (*arguments, result) if isinstance(value, torch.Tensor))
        if shapes not in factors:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}{shapes}".encode()))
            off = 2 * torch.rand(result.shape, generator=generator) - 1
            factors[shapes] = 1 + roundings * torch.finfo(torch.float32).eps * off
        return result * factors[shapes]

    return varied
