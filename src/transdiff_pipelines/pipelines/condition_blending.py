"""Blending condition tokens: one image under the conditions of several classes (paper, Figures 1 and 4).

Shapes: n conditions, B images, M condition tokens, D condition width.
"""

import math
from collections.abc import Sequence

import torch


PATTERNS = ("halves", "interleaved", "random")


def token_shares(
    pattern: str, num_conditions: int, num_tokens: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Which condition each token comes from: `(n, M)` of zeros and ones, every column summing to 1.

    Args:
        pattern: "halves", n runs of neighbouring tokens (the paper's fusion); "interleaved", token i from condition
            i mod n; "random", as many tokens from each, drawn without order.
        generator: draws the "random" pattern; the global one by default.

    Raises:
        ValueError: the pattern is unknown.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"blending pattern {pattern!r} is unknown; choose one of {PATTERNS}, or pass weights")
    positions = torch.arange(num_tokens)
    source = positions * num_conditions // num_tokens if pattern == "halves" else positions % num_conditions
    if pattern == "random":
        device = "cpu" if generator is None else generator.device
        source = source[torch.randperm(num_tokens, generator=generator, device=device).cpu()]
    return (source == torch.arange(num_conditions)[:, None]).float()


def blend_conditions(
    conditions: Sequence[torch.Tensor],
    weights: str | Sequence[float] | torch.Tensor = "halves",
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Blend the conditions `(B, M, D)` of several classes, as `TransDiffPipeline.encode_condition` makes them.

        halves = blend_conditions([pipe.encode_condition("goldfish"), pipe.encode_condition("zebra")])
        image = pipe(condition_embeds=halves).images[0]

    With MRAR give the pipeline a function that blends the condition of each image of the sequence:

        def fused(references):
            return blend_conditions([pipe.encode_condition(name, references) for name in ("goldfish", "zebra")])

        image = pipe(condition_embeds=fused).images[0]

    Args:
        conditions: n tensors of one shape.
        weights: the name of a pattern (see `token_shares`); or n numbers, which interpolate all tokens alike; or a
            tensor `(n, M)` with weights, or a mask, for each token. Weights of a token sum to 1; negative ones
            extrapolate.
        generator: draws the "random" pattern.

    Raises:
        ValueError: shapes differ, or the weights do not fit or do not sum to 1.
    """
    shapes = [tuple(condition.shape) for condition in conditions]
    if not shapes or len(set(shapes)) > 1 or len(shapes[0]) != 3:
        raise ValueError(f"conditions have shapes {shapes}; expected (B, M, D), the same for all of them")
    stack = torch.stack(list(conditions))
    if isinstance(weights, str):
        weights = token_shares(weights, len(shapes), shapes[0][1], generator)
    shares = torch.as_tensor(weights, dtype=torch.float32)
    if shares.ndim == 1:
        shares = shares[:, None]
    if shares.ndim != 2 or len(shares) != len(shapes) or shares.shape[1] not in (1, shapes[0][1]):
        raise ValueError(
            f"weights have shape {tuple(shares.shape)}; expected ({len(shapes)},), one for each condition, or "
            f"({len(shapes)}, {shapes[0][1]}), one for each of its tokens too"
        )
    totals = shares.sum(0).tolist()
    if not all(math.isclose(total, 1.0, abs_tol=1e-3) for total in totals):
        raise ValueError(f"the weights of a token sum to {min(totals):g}..{max(totals):g}; they must sum to 1")
    shares = shares.to(stack.device, non_blocking=True)  # only now, so that reading their sums waits for no device
    return (shares[:, None, :, None] * stack.float()).sum(0).to(stack.dtype)
