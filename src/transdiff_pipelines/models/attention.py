"""Attention and weight initialisation shared by the condition encoder and the decoder.

Shapes: B batch, S query tokens, T key tokens, D width, H heads, E = D / H head width.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn

from .key_value_cache import KeyValue, KeyValueCache


LAYER_NORM_EPS = 1e-6


class TransDiffAttnProcessor:
    """softmax(q kᵀ / √E) v through diffusers' attention dispatcher, so that every backend serves."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "TransDiffAttention",
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        query, key, value = attn.project(hidden_states, encoder_hidden_states)
        if cache is not None:
            key, value = cache.extend(key, value)
        batch, copies = query.shape[0], query.shape[0] // key.shape[0]
        if copies > 1:  # the batch is tiled, its keys and values were computed once
            key, value = key.repeat(copies, 1, 1), value.repeat(copies, 1, 1)
        # `view` and `shape` rather than `unflatten` and `len`, which take longer than the launch of a kernel.
        query, key, value = (states.view(batch, states.shape[1], -1, attn.head_dim) for states in (query, key, value))
        hidden_states = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=attn.dropout if attn.training else 0.0,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        hidden_states = hidden_states.flatten(2, 3).to(query.dtype)
        for layer in attn.to_out:
            hidden_states = layer(hidden_states)
        return hidden_states


class TransDiffAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention with biases and without q/k normalisation; self- or cross-attention.

    Args:
        dim: width D of queries and output.
        heads: number of heads H; D = H * dim_head.
        dim_head: head width E.
        cross_attention_dim: width of the tokens attended to; None makes it self-attention.
        dropout: probability for attention weights and for the output projection.
    """

    _default_processor_cls = TransDiffAttnProcessor
    _available_processors = [TransDiffAttnProcessor]

    def __init__(
        self,
        dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.heads = heads
        self.head_dim = dim_head
        self.inner_dim = heads * dim_head
        self.is_cross_attention = cross_attention_dim is not None
        self.use_bias = True
        self.dropout = dropout

        source_dim = dim if cross_attention_dim is None else cross_attention_dim
        # These two exist only after `fuse_projections`.
        self.to_qkv: nn.Linear
        self.to_kv: nn.Linear
        self.to_q = nn.Linear(dim, self.inner_dim)
        self.to_k = nn.Linear(source_dim, self.inner_dim)
        self.to_v = nn.Linear(source_dim, self.inner_dim)
        self.to_out = nn.ModuleList([nn.Linear(self.inner_dim, dim), nn.Dropout(dropout)])
        self.processor: Callable[..., torch.Tensor] = TransDiffAttnProcessor()

    def project(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | KeyValue | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `(B, S, D)`, keys and values `(B, T, D)`, from fused projections where they were fused."""
        if isinstance(encoder_hidden_states, tuple):
            return self.to_q(hidden_states), *encoder_hidden_states
        if encoder_hidden_states is not None:
            return self.to_q(hidden_states), *self.project_key_value(encoder_hidden_states)
        if self.fused_projections:
            return self.to_qkv(hidden_states).chunk(3, dim=-1)
        return self.to_q(hidden_states), self.to_k(hidden_states), self.to_v(hidden_states)

    def project_key_value(self, encoder_hidden_states: torch.Tensor) -> KeyValue:
        """Keys and values `(B, T, D)` of the tokens that a cross-attention attends to."""
        if self.fused_projections:
            key, value = self.to_kv(encoder_hidden_states).chunk(2, dim=-1)
            return key, value
        return self.to_k(encoder_hidden_states), self.to_v(encoder_hidden_states)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        """Attend from `(B, S, D)` to `encoder_hidden_states` `(B, T, ·)`, or to itself.

        Args:
            encoder_hidden_states: the tokens attended to, or their keys and values from `project_key_value`. Of B / k
                rows they serve a batch that is k copies of a smaller one, one after the other.
            attention_mask: boolean, broadcastable to `(B, H, S, T)`, True where a query may look.
            cache: keys and values of tokens before these, which self-attention sees too; extended by these.
        """
        return self.processor(self, hidden_states, encoder_hidden_states, attention_mask, cache)


def check_attention_kwargs(attention_kwargs: Any) -> float:
    """The weight of the LoRA adapters in a call: `attention_kwargs["scale"]`, by default 1.

    Raises:
        TypeError: they are no mapping, or the scale is no number.
        ValueError: there is another entry, which nothing would read, or the scale is not finite.
    """
    if attention_kwargs is None:
        return 1.0
    if not isinstance(attention_kwargs, Mapping):
        raise TypeError(
            f"attention_kwargs {attention_kwargs!r} is a {type(attention_kwargs).__name__}; expected a dict"
        )
    unknown = [name for name in attention_kwargs if name != "scale"]
    if unknown:
        raise ValueError(
            f"attention_kwargs has {unknown}, which nothing reads; its one entry is 'scale', the weight of "
            "the LoRA adapters in this call"
        )
    scale = attention_kwargs.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"attention_kwargs['scale'] {scale!r} is a {type(scale).__name__}; expected a number")
    if not math.isfinite(scale):
        raise ValueError(f"attention_kwargs['scale'] is {scale}; expected a finite number")
    return float(scale)


def weighable_layers(model: nn.Module, scale: float) -> list[Any]:
    """The model's LoRA layers, to be weighed by `scale`; ValueError where they are fused, so that none can be."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "scale_layer")]
    if any(layer.merged for layer in layers):
        raise ValueError(
            f"attention_kwargs has scale {scale}, but LoRA adapters are fused into the weights; call unfuse_lora() "
            "first, or give the weight to fuse_lora(lora_scale=...)"
        )
    return layers


@contextmanager
def scaled_lora(model: nn.Module, attention_kwargs: dict[str, Any] | None) -> Iterator[None]:
    """Weigh the model's active LoRA adapters by `attention_kwargs["scale"]`, if given.

    diffusers' decorator `apply_lora_scale` would do, but its wrapper is one piece of code for all models, so that
    torch.compile takes the second model for a recompilation of the first; and after a scale of 0 it leaves every
    adapter at 1, whatever its weight was.

    Raises:
        TypeError, ValueError: see `check_attention_kwargs`; or the adapters are fused, so that none can be weighed.
    """
    scale = check_attention_kwargs(attention_kwargs)
    if scale == 1.0:
        yield
        return
    layers = weighable_layers(model, scale)
    weights = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scale_layer(scale)
        yield
    finally:
        for layer, scaling in zip(layers, weights, strict=True):
            layer.scaling.update(scaling)


def feed_forward(dim: int, mlp_ratio: float, dropout: float) -> FeedForward:
    """The MLP of both models: Linear, exact GELU, dropout, Linear, dropout."""
    return FeedForward(dim, inner_dim=int(dim * mlp_ratio), activation_fn="gelu", dropout=dropout, final_dropout=True)


def initialize_linear_and_norm_weights(model: nn.Module) -> None:
    """Linears Xavier-uniform with zero bias; LayerNorms at their own default of 1 and 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, TransDiffAttention) and not module.is_cross_attention:
            for projection in (module.to_q, module.to_k, module.to_v):
                # Parity: the released model keeps the three as one (3D, D) linear, whose Xavier bound √(6 / 4D)
                # is 1/√2 of that of a (D, D) linear.
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))
