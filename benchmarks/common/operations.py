"""Floating-point operations of a call, counted by torch while it runs, and what they let one expect.

One multiply-add is two operations. Counted are matrix products, convolutions and attention; norms, activations and
sums are not: they cost time by the memory they move, not by their arithmetic.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from transdiff_pipelines.presets import ModelSize


def _attention_on_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


# torch counts the operations of every attention kernel except the one for CPUs.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_on_cpu}


def count_flops(call: Callable[[], Any]) -> FlopCounterMode:
    """Run `call` and count; compiled modules run as they are written."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with torch.compiler.set_stance("force_eager"), counter:
        call()
    return counter


@dataclass(frozen=True)
class Operations:
    """FLOPs of a call, summed over the images of a sequence: those of one step of each, and all others."""

    before: int
    step: int

    def total(self, steps: int) -> int:
        """FLOPs of a whole call with `steps` steps an image."""
        return self.before + steps * self.step

    @classmethod
    def of(cls, sample: Callable[[int], Any], network: nn.Module) -> "Operations":
        """Counted in `sample(1)`, a call with one step an image; a step is what runs within `network`."""
        counter = count_flops(lambda: sample(1))
        step = sum(counter.get_flop_counts()[type(network).__name__].values())
        return cls(before=counter.get_total_flops() - step, step=step)


def limit_arithmetic(size: ModelSize, latent_tokens: int = 256, condition_tokens: int = 256) -> str:
    """Why cross-attention keys and values computed once cannot save more than they do, in words and numbers."""
    width, layers = size.width, size.decoder_layers
    attention = 2 * (latent_tokens + condition_tokens)  # q kᵀ and weights · v, for each latent token, times width
    share = condition_tokens / latent_tokens  # keys and values are of condition tokens
    ours = layers * (14 * width**2 + attention * width)
    theirs = ours + layers * 2 * share * width**2 + share * width**2
    return (
        f"{size.name}, {latent_tokens} latent and {condition_tokens} condition tokens, multiply-adds a latent token "
        f"and step: {layers} blocks x (4 D² self-attention + 2 D² cross-attention queries and output + 8 D² MLP + "
        f"{attention} D attention) = {ours / 1e6:.1f} M; computed again at each step without caching: {layers} x "
        f"{2 * share:g} D² keys and values + {share:g} D² condition projection = {(theirs - ours) / 1e6:.1f} M; limit "
        f"{theirs / ours:.3f}"
    )
