"""The diffusion decoder: a DiT that predicts the velocity of a noisy latent, given condition tokens.

Shapes: B batch, C latent channels, s latent side, P patch size, T = (s / P)² latent tokens, M condition tokens,
D width.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..latents import pack_latents, unpack_latents
from .adapters import AdapterMixin
from .attention import (
    LAYER_NORM_EPS,
    TransDiffAttention,
    feed_forward,
    initialize_linear_and_norm_weights,
    scaled_lora,
)
from .key_value_cache import KeyValue
from .saving import SavingMixin


TIMESTEP_CHANNELS = 256


class Affine(NamedTuple):
    """Weight and bias `(D,)` of a norm that have a modulation in them: one pass over the tokens, not two."""

    weight: torch.Tensor
    bias: torch.Tensor


class ModulatedLayerNorm(nn.LayerNorm):
    """LN(x) (1 + scale) + shift. One row of these, for a whole batch as in sampling, goes into the affine weights."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, modulation: Affine | tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor:
        """`modulation` is shift and scale `(B or 1, 1, D)`, or what became of one row of them."""
        if not isinstance(modulation, Affine):
            shift, scale = modulation
            if len(scale) > 1:
                return torch.addcmul(shift, super().forward(hidden_states), 1 + scale)
            modulation = Affine((1 + scale).flatten(), shift.flatten())
            if self.elementwise_affine:
                weight, bias = modulation
                modulation = Affine(weight * self.weight, torch.addcmul(bias, weight, self.bias))
        return F.layer_norm(hidden_states, self.normalized_shape, *modulation, self.eps)


class BlockModulation(NamedTuple):
    """What one time for the whole batch does to a block: its norms' weights and its gates `(D,)`."""

    norm1: Affine
    gate_attn: torch.Tensor
    norm3: Affine
    gate_ff: torch.Tensor


class TransDiffTransformerBlock(nn.Module):
    """Self-attention and MLP, modulated and gated by time; cross-attention to the condition, neither."""

    def __init__(self, dim: int, heads: int, dim_head: int, mlp_ratio: float, dropout: float):
        super().__init__()
        self.norm1 = ModulatedLayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn1 = TransDiffAttention(dim, heads, dim_head, dropout=dropout)
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn2 = TransDiffAttention(dim, heads, dim_head, cross_attention_dim=dim, dropout=dropout)
        self.norm3 = ModulatedLayerNorm(dim, eps=LAYER_NORM_EPS)
        self.ff = feed_forward(dim, mlp_ratio, dropout)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | KeyValue,
        modulation: torch.Tensor | BlockModulation,
    ) -> torch.Tensor:
        """`hidden_states` `(B, T, D)`, condition `(B, M, D)` or its keys and values, `modulation` `(B or 1, 6, D)` or
        what `modulations_of` made of it.
        """
        norm1: Affine | tuple[torch.Tensor, torch.Tensor]
        norm3: Affine | tuple[torch.Tensor, torch.Tensor]
        if isinstance(modulation, BlockModulation):
            norm1, gate_attn, norm3, gate_ff = modulation
        else:
            vectors = (self.scale_shift_table + modulation).to(hidden_states.dtype)
            shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = vectors.chunk(6, dim=1)
            norm1, norm3 = (shift_attn, scale_attn), (shift_ff, scale_ff)

        attended = self.attn1(self.norm1(hidden_states, norm1))
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        hidden_states = hidden_states + self.attn2(self.norm2(hidden_states), encoder_hidden_states)
        transformed = self.ff(self.norm3(hidden_states, norm3))
        return torch.addcmul(hidden_states, gate_ff, transformed)


def modulations_of(blocks: Sequence[Any], modulation: torch.Tensor, dtype: torch.dtype) -> list[BlockModulation]:
    """Of every block what `modulation` `(1, 6, D)`, of one time for the whole batch, makes of its norms and gates.

    For all blocks at once: launched one by one, on a GPU these small operations were a quarter of those of a step.
    """
    norms = [norm for block in blocks for norm in (block.norm1, block.norm3)]
    vectors = (torch.cat([block.scale_shift_table for block in blocks]) + modulation).to(dtype)
    shift, scale, gate = vectors.unflatten(1, (2, 3)).flatten(0, 1).unbind(1)  # of each norm
    scale = 1 + scale
    weights = (scale * torch.stack([norm.weight for norm in norms])).unbind()
    biases = torch.addcmul(shift, scale, torch.stack([norm.bias for norm in norms])).unbind()
    affines = [Affine(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    gates = gate.unbind()
    return [
        BlockModulation(affines[first], gates[first], affines[first + 1], gates[first + 1])
        for first in range(0, len(norms), 2)
    ]


class TransDiffTransformer2DModel(SavingMixin, AdapterMixin, ModelMixin, AttentionMixin, ConfigMixin, CacheMixin):
    """The DiT decoder of TransDiff: velocity v = ε - x₀ of x_t = (1 - t) x₀ + t ε (paper, Eq. 4, 5).

    With `num_flow_map_layers` it is a flow map: it also takes a next time r ≤ t and predicts the average velocity u on
    the way there, so that x_r = x_t - (t - r) u in one call. The first blocks go on seeing t, the last ones and the
    final layer see r (decoupled MeanFlow, arXiv 2510.24474). At r = t that is the velocity, and no weight is new: the
    entry alone makes a velocity model of any size one to train a flow map from.

    Args:
        sample_size: latent side s (16 for 256 px, 32 for 512 px).
        in_channels: latent channels C.
        patch_size: side P of the patch that is one token; 1 in the published models.
        num_layers: transformer blocks.
        num_attention_heads, attention_head_dim: their product is the width D.
        cross_attention_dim: width of the condition tokens.
        mlp_ratio: hidden width of the MLPs over D.
        dropout: probability on attention weights, attention outputs and both MLP linears, while training.
        num_flow_map_layers: how many of the last blocks are conditioned on the next time, the final layer with them;
            0 is a velocity model.

    Raises:
        ValueError: `patch_size` does not divide `sample_size`, or there are fewer blocks than `num_flow_map_layers`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransDiffTransformerBlock"]
    _repeated_blocks = ["TransDiffTransformerBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "time_embedding", "norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 16,
        patch_size: int = 1,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 768,
        mlp_ratio: float = 4.0,
        dropout: float = 0.1,
        num_flow_map_layers: int = 0,
    ):
        super().__init__()
        if not 0 <= num_flow_map_layers <= num_layers:
            raise ValueError(
                f"num_flow_map_layers is {num_flow_map_layers}; expected 0 (a velocity model) to num_layers, "
                f"{num_layers}"
            )
        if patch_size < 1 or sample_size % patch_size:
            raise ValueError(
                f"patch_size {patch_size} does not divide sample_size {sample_size}; choose a divisor of it"
            )
        dim = num_attention_heads * attention_head_dim
        token_dim = in_channels * patch_size**2

        self.proj_in = nn.Linear(token_dim, dim)
        self.position_embedding = nn.Parameter(torch.empty(1, (sample_size // patch_size) ** 2, dim))
        self.condition_projection = nn.Linear(cross_attention_dim, dim)
        # [cos(ts f_i), sin(ts f_i)], f_i = 10000^(-i / 128). Parity: in float32, as the released weights were trained;
        # a more exact sinusoid is further from the authors' numbers.
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(TIMESTEP_CHANNELS, dim)
        self.time_modulation = nn.Linear(dim, 6 * dim)
        self.transformer_blocks = nn.ModuleList(
            TransDiffTransformerBlock(dim, num_attention_heads, attention_head_dim, mlp_ratio, dropout)
            for _ in range(num_layers)
        )
        self.norm_out = ModulatedLayerNorm(dim, eps=LAYER_NORM_EPS, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))
        self.proj_out = nn.Linear(dim, token_dim)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Linears Xavier-uniform with zero bias, modulation tables normal / √D, the last linear zero."""
        initialize_linear_and_norm_weights(self)
        nn.init.normal_(self.position_embedding, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        nn.init.zeros_(self.proj_out.weight)

    def embed_time(self, timestep: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Timesteps `(B,)` to the time embedding `(B, D)` and the modulation `(B, 6, D)` that all blocks share."""
        # The sinusoid is float32 whatever the model's dtype: bfloat16 cannot tell timestep 960 from 962.
        embedding = self.time_embedding(self.time_proj(timestep.float()).to(dtype))
        modulation = self.time_modulation(F.silu(embedding))
        return embedding, modulation.unflatten(-1, (6, -1))

    @property
    def cross_attentions(self) -> list[TransDiffAttention]:
        """The cross-attention of every block."""
        return [block.attn2 for block in self.transformer_blocks]  # type: ignore[misc]

    @apply_forward_hook
    def project_condition(
        self, encoder_hidden_states: torch.Tensor, attention_kwargs: dict[str, Any] | None = None
    ) -> list[KeyValue]:
        """Cross-attention keys and values of every block, `(B, M, D)` each, of condition tokens `(B, M, ·)`.

        They depend on the condition alone: computed once, they serve every denoising step in place of the tokens, and
        in training every timestep: k latents may share a condition, in a batch of B conditions tiled k times.
        """
        with scaled_lora(self, attention_kwargs):
            condition = self.condition_projection(encoder_hidden_states)
            return [layer.project_key_value(condition) for layer in self.cross_attentions]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float | int,
        encoder_hidden_states: torch.Tensor | list[KeyValue],
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        next_timestep: torch.Tensor | float | int | None = None,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Velocity `(B, C, s, s)` of the noisy latents `hidden_states` `(B, C, s, s)`.

        Args:
            timestep: 1000 t in [0, 1000], `(B,)`, or one value for the batch; fractions are meaningful.
            encoder_hidden_states: condition tokens `(B, M, cross_attention_dim)`, any number of them, or what
                `project_condition` made of them.
            attention_kwargs: `{"scale": s}` weighs the active LoRA adapters by s in this call.
            next_timestep: of a flow map 1000 r, in the form of `timestep` and not above it: the result is the average
                velocity from t to r. None is r = t, where that is the velocity itself.

        Raises:
            ValueError: `hidden_states` is not of the latent size and channel count of the config; a velocity model was
                given a `next_timestep`.
        """
        height, width = hidden_states.shape[-2:]
        expected = (self.config.in_channels, self.config.sample_size, self.config.sample_size)
        if tuple(hidden_states.shape[1:]) != expected:
            raise ValueError(f"latents have shape {tuple(hidden_states.shape)}; expected (B, *{expected})")
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        if next_timestep is not None:
            if self.config.num_flow_map_layers == 0:
                raise ValueError(
                    "next_timestep was given to a velocity model (num_flow_map_layers=0), which knows one time alone; "
                    "leave it out, or load a checkpoint trained as a flow map"
                )
            next_timestep = torch.as_tensor(next_timestep, device=hidden_states.device)

        with scaled_lora(self, attention_kwargs):
            tokens = self._predict_tokens(hidden_states, timestep, next_timestep, encoder_hidden_states)
        sample = unpack_latents(tokens, self.config.patch_size, height, width)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _predict_tokens(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        next_timestep: torch.Tensor | None,
        encoder_hidden_states: torch.Tensor | list[KeyValue],
    ) -> torch.Tensor:
        """Velocity as tokens `(B, T, C P²)`."""
        tokens = self.proj_in(pack_latents(hidden_states, self.config.patch_size)) + self.position_embedding
        if isinstance(encoder_hidden_states, torch.Tensor):
            conditions = [self.condition_projection(encoder_hidden_states)] * len(self.transformer_blocks)
        else:
            conditions = encoder_hidden_states
        blocks: list[Any] = list(self.transformer_blocks)
        first = len(blocks) - (0 if next_timestep is None else self.config.num_flow_map_layers)
        # Projected conditions mean that the blocks carry no hooks, which may have their weights elsewhere.
        at_once = not isinstance(encoder_hidden_states, torch.Tensor)
        modulations: list[torch.Tensor | BlockModulation] = []
        for part, time in ((blocks[:first], timestep), (blocks[first:], next_timestep)):
            if time is None:
                continue
            # A timestep for the whole batch is not expanded, so that its modulation is computed once and broadcast.
            time_embedding, shared = self.embed_time(time.reshape(-1), tokens.dtype)
            one_time = at_once and time.ndim == 0 and len(part) > 0
            modulations += modulations_of(part, shared, tokens.dtype) if one_time else [shared] * len(part)
        for block, condition, modulation in zip(blocks, conditions, modulations, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, modulation)
            else:
                tokens = block(tokens, condition, modulation)

        shift, scale = (self.scale_shift_table + time_embedding[:, None]).to(tokens.dtype).chunk(2, dim=1)
        return self.proj_out(self.norm_out(tokens, (shift, scale)))
