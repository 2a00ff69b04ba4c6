"""The autoregressive transformer: class labels, and images already made, become condition tokens.

Shapes: B batch, C latent channels, s latent side, p AR patch size, S = s * s AR tokens, N = p * p images in a
sequence of S / N tokens each (or other group sizes, see `scales`), n reference images, K class tokens, D width.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

from ..latents import pack_latents
from .adapters import AdapterMixin
from .attention import (
    LAYER_NORM_EPS,
    TransDiffAttention,
    feed_forward,
    initialize_linear_and_norm_weights,
    scaled_lora,
)
from .key_value_cache import KeyValueCache
from .saving import SavingMixin


@dataclass
class ARConditionEncoderOutput(BaseOutput):
    """Condition tokens of the `n + 1` groups encoded.

    Attributes:
        condition: `(B, (n + 1) * S / N, D)`, what the decoder attends to.
        features: the same before the second position embedding; the semantic-diversity measure
            (paper, Appendix D) is taken on these.
    """

    condition: torch.Tensor
    features: torch.Tensor


class ARTransformerBlock(nn.Module):
    """Pre-norm transformer block: self-attention, then an MLP."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = TransDiffAttention(dim, heads, dim_head, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ff = feed_forward(dim, mlp_ratio, dropout)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> torch.Tensor:
        attended = self.attn(self.norm1(hidden_states), attention_mask=attention_mask, cache=cache)
        hidden_states = hidden_states + attended
        return hidden_states + self.ff(self.norm2(hidden_states))


class ARConditionEncoder(SavingMixin, AdapterMixin, ModelMixin, AttentionMixin, ConfigMixin):
    """Class labels, and with MRAR the images made so far, to condition tokens (paper, Eq. 9-12).

    `patch_size` 1 is the 1-step model: one group of S mask tokens, attention in both directions, the condition a
    function of the label alone. A larger p is Multi-Reference Autoregression: N = p² groups of S / N tokens, the
    first of mask tokens, group i of image i - 1, with attention block-causal over [class tokens][group 0]…
    With `scales` it is scale-level autoregression, the paper's ablation: group i is image i - 1 averaged down to
    `scales[i]` tokens a side, so that every image of the sequence can be a finer version of the one before.

    Args:
        num_classes: number of classes; the label `num_classes` is the null class of classifier-free guidance.
        sample_size: latent side s the AR sequence is built for (16 in every published model, 512 px included).
        in_channels: latent channels C.
        patch_size: AR patch size p, a divisor of `sample_size`.
        scales: growing sides of the groups, in tokens; N of them, whose squares sum to at most S. None: equal groups.
        num_class_tokens: copies K of the class embedding in front of the sequence.
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: their product is the width D.
        mlp_ratio: hidden width of the MLPs over D.
        dropout: probability on attention weights, attention outputs and both MLP linears, while training.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ARTransformerBlock"]
    _repeated_blocks = ["ARTransformerBlock"]
    _skip_layerwise_casting_patterns = ["class_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        num_classes: int = 1000,
        sample_size: int = 16,
        in_channels: int = 16,
        patch_size: int = 1,
        num_class_tokens: int = 64,
        num_layers: int = 24,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        scales: list[int] | None = None,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        num_tokens = sample_size**2
        self.group_sizes = group_sizes(sample_size, patch_size, scales)
        self.num_images = len(self.group_sizes)
        self.null_class = num_classes

        # The last row is the null class, so dropping a label is choosing another label.
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        # Nothing reads the projection of a 1-step model; it exists because the released checkpoints hold it.
        self.reference_projection = nn.Linear(in_channels * patch_size**2, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1 if self.num_images == 1 else self.group_sizes[0], dim))
        self.position_embedding = nn.Parameter(torch.empty(1, num_class_tokens + num_tokens, dim))
        self.input_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.transformer_blocks = nn.ModuleList(
            ARTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, dropout)
            for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.condition_position_embedding = nn.Parameter(torch.empty(1, num_tokens, dim))
        self.register_buffer("attention_mask", self._block_causal_mask(), persistent=False)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linears Xavier-uniform with zero bias, LayerNorms 1 and 0, every embedding normal with std 0.02."""
        initialize_linear_and_norm_weights(self)
        for embedding in (
            self.class_embedding.weight,
            self.mask_token,
            self.position_embedding,
            self.condition_position_embedding,
        ):
            nn.init.normal_(embedding, std=0.02)

    def _block_causal_mask(self) -> torch.Tensor | None:
        """`(K + S, K + S)`, True where a token may look: at its own group and all earlier ones (Eq. 12)."""
        if self.num_images == 1:
            return None
        sizes = (self.config.num_class_tokens, *self.group_sizes)
        # The output size is given, because on the meta device it cannot be computed from values.
        group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes))
        return group[:, None] >= group[None, :]

    def new_cache(self) -> list[KeyValueCache]:
        """Empty caches, one a block, for a sequence that is encoded group by group."""
        return [KeyValueCache() for _ in self.transformer_blocks]

    def _check_references(self, class_labels: torch.Tensor, reference_latents: torch.Tensor, num_seen: int) -> None:
        channels, side = self.config.in_channels, self.config.sample_size
        expected = (class_labels.shape[0], "n", channels, side, side)
        shape = tuple(reference_latents.shape)
        if len(shape) != 5 or (shape[0], *shape[2:]) != (expected[0], *expected[2:]):
            raise ValueError(f"reference_latents has shape {shape}; expected {expected}, n images per label")
        num_references = num_seen + shape[1]
        if num_references >= self.num_images:
            raise ValueError(
                f"{num_references} reference images do not fit: a sequence of {self.num_images} images "
                f"({self._describe_groups()}) takes at most {self.num_images - 1}"
            )

    def _describe_groups(self) -> str:
        scales = self.config.scales
        return f"patch_size {self.config.patch_size}" if scales is None else f"scales {scales}"

    def _references_seen(self, past: int) -> int:
        """Reference images among the first `past` tokens."""
        num_tokens = past - self.config.num_class_tokens
        if self.config.scales is None:  # only arithmetic, so that a compiled encoder serves every length
            return max(num_tokens // self.group_sizes[0] - 1, 0)
        return max(sum(end <= num_tokens for end in accumulate(self.group_sizes)) - 1, 0)

    def _embed_labels(self, class_labels: torch.Tensor) -> torch.Tensor:
        """The head of a sequence, `(B, K + S / N, D)`: class tokens and the group of mask tokens."""
        class_token = self.class_embedding(class_labels).unsqueeze(1)
        mask_tokens = self.mask_token.expand(class_labels.shape[0], self.group_sizes[0], -1)
        return torch.cat([class_token.expand(-1, self.config.num_class_tokens, -1), mask_tokens], dim=1)

    def _embed_references(self, reference_latents: torch.Tensor, num_seen: int) -> torch.Tensor:
        """Groups of tokens `(B, n * S / N, D)` of latents `(B, n, C, s, s)` that follow `num_seen` earlier ones."""
        images = reference_latents.unbind(1)
        if self.config.scales is not None:
            sides = self.config.scales[1 + num_seen :]
            images = tuple(
                F.interpolate(image, (side, side), mode="area") for image, side in zip(images, sides, strict=False)
            )
        patches = torch.cat([pack_latents(image, self.config.patch_size) for image in images], dim=1)
        return self.reference_projection(patches.to(self.mask_token.dtype))

    def forward(
        self,
        class_labels: torch.Tensor,
        reference_latents: torch.Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        cache: list[KeyValueCache] | None = None,
    ) -> ARConditionEncoderOutput | tuple[torch.Tensor, torch.Tensor]:
        """Encode labels `(B,)` int64 and scaled latents `(B, n, C, s, s)` of n < N earlier images, or None.

        `attention_kwargs` `{"scale": s}` weighs the active LoRA adapters by s in this call.

        Returns `condition` and `features`, `(B, (n + 1) * S / N, D)` each. With block-causal attention the first
        groups of a longer sequence are those of a shorter one, so a sequence can be encoded group by group: pass
        the same `cache` (from `new_cache`) to every call, first without references, then with the images not yet
        seen; each call returns the new groups alone.

        Raises:
            ValueError: `reference_latents` has another shape, or too many images, or there is nothing to encode.
        """
        if class_labels.ndim != 1:
            raise ValueError(f"class_labels has shape {tuple(class_labels.shape)}; expected one label a sample, (B,)")
        past = cache[0].length if cache else 0
        with scaled_lora(self, attention_kwargs):
            features = self._encode(class_labels, reference_latents, cache, past)
        first = max(past - self.config.num_class_tokens, 0)
        condition = features + self.condition_position_embedding[:, first : first + features.shape[1]]
        if not return_dict:
            return condition, features
        return ARConditionEncoderOutput(condition=condition, features=features)

    def _encode(
        self,
        class_labels: torch.Tensor,
        reference_latents: torch.Tensor | None,
        cache: list[KeyValueCache] | None,
        past: int,
    ) -> torch.Tensor:
        """Features of the tokens after the `past` ones that the cache has seen, without those of the class tokens."""
        num_class_tokens = self.config.num_class_tokens
        tokens = [] if past else [self._embed_labels(class_labels)]
        num_references = 0
        if reference_latents is not None:
            num_seen = self._references_seen(past)
            self._check_references(class_labels, reference_latents, num_seen)
            num_references = reference_latents.shape[1]
            tokens.append(self._embed_references(reference_latents, num_seen))
        if not tokens:
            raise ValueError("the cache has seen the labels already; pass reference_latents, or a new cache")
        hidden_states = torch.cat(tokens, dim=1)

        length = past + hidden_states.shape[1]
        # The mask hides later groups, and after a cached past a single group has none: it may look everywhere.
        mask = None if past and num_references == 1 else self._attention_mask(past, length)
        hidden_states = self.input_norm(hidden_states + self.position_embedding[:, past:length])
        for i, block in enumerate(self.transformer_blocks):
            layer_cache = cache[i] if cache else None
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, mask, layer_cache)
            else:
                hidden_states = block(hidden_states, mask, layer_cache)
        return self.norm_out(hidden_states[:, max(num_class_tokens - past, 0) :])

    def _attention_mask(self, past: int, length: int) -> torch.Tensor | None:
        """Where tokens `past`..`length` may look; None: everywhere."""
        return None if self.attention_mask is None else self.attention_mask[None, None, past:length, :length]


def group_sizes(sample_size: int, patch_size: int, scales: list[int] | None) -> tuple[int, ...]:
    """Tokens of each group of a sequence: N equal ones, or the squares of `scales`.

    Raises:
        ValueError: the groups do not fit into `sample_size` squared tokens, or are described twice.
    """
    if patch_size < 1 or sample_size % patch_size:
        raise ValueError(f"patch_size {patch_size} does not divide sample_size {sample_size}; choose a divisor of it")
    if scales is None:
        return (sample_size**2 // patch_size**2,) * patch_size**2
    if patch_size > 1:
        raise ValueError(f"scales {scales} and patch_size {patch_size} both divide the sequence; set patch_size 1")
    if (
        len(scales) < 2
        or scales[0] < 1
        or any(small >= large for small, large in zip(scales, scales[1:], strict=False))
    ):
        raise ValueError(f"scales {scales} must be two or more growing sides of groups of tokens, such as [1, 2, 3]")
    sizes = tuple(scale**2 for scale in scales)
    if sum(sizes) > sample_size**2:
        raise ValueError(
            f"scales {scales} make {sum(sizes)} tokens, but a sequence has {sample_size**2} (sample_size "
            f"{sample_size} squared); leave out or shrink some"
        )
    return sizes
