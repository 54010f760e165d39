"""Multi-head attention: within a sequence with rotary positions, and from a decoder to the output of an encoder."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.experts.projection import attention_score_flops
from moebench.model_config import ModelConfig
from moebench.models.dropout import SequenceDropout
from moebench.models.norms import DEFAULT_NORM, NormStyle, QueryKeyNorm
from moebench.models.positions import PositionTable, Rotary, rotate
from moebench.routing.linear_map import OUTPUT_FIRST, LinearMap


@dataclass(frozen=True, kw_only=True, eq=False)
class EncoderOutput:
    """The output of an encoder for sequences of M vectors: a decoder attends to it."""

    x_BMD: Tensor
    valid_BM: Tensor | None = None
    """bool: False at padding; at least one of each sequence is True. None: nothing is padded."""

    @classmethod
    def of(cls, x_BMD: Tensor, positions: PositionTable | None) -> "EncoderOutput":
        """Return the output for full sequences."""
        return cls(x_BMD=x_BMD, valid_BM=None if positions is None else positions.valid_BL)


@dataclass(frozen=True, kw_only=True)
class AttentionStyle:
    """What the attention of all blocks of a model has in common, dense or with experts."""

    d_model: int
    num_heads: int
    num_kv_heads: int
    rotary: Rotary
    out_scale: float
    """Factor on the initial output projection (residual depth scaling)."""
    bias: Literal["none", "qkv", "all"] = "none"
    qk_norm: Literal["none", "head", "full"] = "none"
    norm: NormStyle = DEFAULT_NORM

    @classmethod
    def of(cls, model: ModelConfig, out_scale: float) -> "AttentionStyle":
        """Return the attention of a configuration."""
        return cls(
            d_model=model.d_model,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads or model.num_heads,
            rotary=Rotary.of(model),
            out_scale=out_scale,
            bias=model.attention_bias,
            qk_norm=model.qk_norm,
            norm=NormStyle.of(model),
        )

    @property
    def head_width(self) -> int:
        """Width of a query, key or value of one head."""
        return self.d_model // self.num_heads

    @property
    def kv_width(self) -> int:
        """Width of the keys of all heads together, and of their values."""
        return self.num_kv_heads * self.head_width

    @property
    def has_qkv_bias(self) -> bool:
        """Whether the projections to queries, keys and values have biases."""
        return self.bias != "none"

    @property
    def has_out_bias(self) -> bool:
        """Whether the output projection has a bias."""
        return self.bias == "all"

    def build_qk_norm(self, query_width: int, key_width: int) -> QueryKeyNorm | None:
        """Return the norm of queries and keys of these widths, all heads together; None without one."""
        if self.qk_norm == "none":
            return None
        if self.qk_norm == "head":
            query_width = key_width = self.head_width
        return QueryKeyNorm(self.norm, query_width, key_width)


class Attention(nn.Module):
    """Softmax attention over the whole sequence, or over the past when causal."""

    def __init__(self, style: AttentionStyle, *, causal: bool) -> None:
        super().__init__()
        self.style = style
        self.causal = causal
        self.qkv = nn.Linear(style.d_model, style.d_model + 2 * style.kv_width, bias=style.has_qkv_bias)
        self.out = nn.Linear(style.d_model, style.d_model, bias=style.has_out_bias)
        self.qk_norm = style.build_qk_norm(style.d_model, style.kv_width)

    def init_weights(self, generator: Generator) -> None:
        """Initialise normally with variance 1 / fan-in; the output is scaled for the depth of the residual stream."""
        init_linear(self.qkv, generator)
        init_linear(self.out, generator, scale=self.style.out_scale)

    def forward(
        self, x_BLD: Tensor, positions: PositionTable | None = None, dropout: SequenceDropout | None = None
    ) -> Tensor:
        """Return the attention output, without the residual.

        `positions`: for parts of sequences or padding; `dropout`: of the weights.
        """
        heads = Heads.split(self.qkv(x_BLD), self.style, self.qk_norm)
        mixed_BLD = heads.attend(self.style.rotary, causal=self.causal, positions=positions, dropout=dropout)
        out: Tensor = self.out(mixed_BLD)
        return out

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where queries, keys and values are in their common projection."""
        style = self.style
        return {"qkv.weight": replace(OUTPUT_FIRST, out_parts=(style.d_model, style.kv_width, style.kv_width))}

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`, the masked half included."""
        weights = self.qkv.weight.numel() + self.out.weight.numel()
        return 2 * weights + attention_score_flops(length, self.out.in_features)


class CrossAttention(nn.Module):
    """Softmax attention of each position of a decoder over the output of its encoder; without positions, as in T5."""

    def __init__(self, style: AttentionStyle) -> None:
        super().__init__()
        self.style = style
        self.query = nn.Linear(style.d_model, style.d_model, bias=style.has_qkv_bias)
        self.key_value = nn.Linear(style.d_model, 2 * style.kv_width, bias=style.has_qkv_bias)
        self.out = nn.Linear(style.d_model, style.d_model, bias=style.has_out_bias)
        self.qk_norm = style.build_qk_norm(style.d_model, style.kv_width)

    def init_weights(self, generator: Generator) -> None:
        """Initialise as self-attention does."""
        for projection in (self.query, self.key_value):
            init_linear(projection, generator)
        init_linear(self.out, generator, scale=self.style.out_scale)

    def forward(self, x_BLD: Tensor, encoder_output: EncoderOutput, dropout: SequenceDropout | None = None) -> Tensor:
        """Return the attention output for each position, without the residual; `dropout`: of the weights."""
        key_BMX, value_BMX = self.key_value(encoder_output.x_BMD).chunk(2, dim=-1)
        heads = Heads.of(self.query(x_BLD), key_BMX, value_BMX, self.style.head_width, self.qk_norm)
        valid_BM = encoder_output.valid_BM
        mask = None if valid_BM is None else valid_BM[:, None, None, :]
        out: Tensor = self.out(heads.mix_values(mask, causal=False, dropout=dropout))
        return out

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where keys and values are in their common projection."""
        return {"key_value.weight": replace(OUTPUT_FIRST, out_parts=(self.key_value.out_features // 2,) * 2)}

    def flops(self, length: int, encoder_length: int) -> int:
        """Return the forward FLOPs of one sequence of `length` that attends to `encoder_length` vectors."""
        weights = self.query.weight.numel() + self.out.weight.numel()
        per_position = 2 * weights + attention_score_flops(encoder_length, self.out.in_features)
        return length * per_position + encoder_length * 2 * self.key_value.weight.numel()


@dataclass(frozen=True, kw_only=True, eq=False)
class Heads:
    """Queries, keys and values, each [batch, head, length, head width]; of keys and values there may be fewer heads."""

    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def split(cls, qkv_BLO: Tensor, style: AttentionStyle, qk_norm: QueryKeyNorm | None) -> "Heads":
        """Split one projection of queries, keys and values; without the last part, the keys are the values too."""
        batch, length, width = qkv_BLO.shape
        num_parts = (width - style.d_model) // style.kv_width
        if qk_norm is None and style.kv_width == style.d_model:  # with fewer operations where all parts are equal
            parts = qkv_BLO.view(batch, length, 1 + num_parts, style.num_heads, style.head_width)
            query, *others = parts.transpose(1, 3).unbind(2)
            return cls(query=query, key=others[0], value=others[-1])
        query_BLX, *rest = torch.split(qkv_BLO, [style.d_model, *[style.kv_width] * num_parts], dim=-1)
        return cls.of(query_BLX, rest[0], rest[-1], style.head_width, qk_norm)

    @classmethod
    def of(
        cls, query_BLX: Tensor, key_BMX: Tensor, value_BMX: Tensor, head_width: int, qk_norm: QueryKeyNorm | None
    ) -> "Heads":
        """Divide vectors with all heads, and norm the queries and keys."""
        if qk_norm is not None:
            query_BLX, key_BMX = qk_norm(query_BLX, key_BMX)
        return cls(
            query=_divide_heads(query_BLX, head_width),
            key=_divide_heads(key_BMX, head_width),
            value=_divide_heads(value_BMX, head_width),
        )

    def attend(
        self,
        rotary: Rotary,
        *,
        causal: bool,
        positions: PositionTable | None = None,
        dropout: SequenceDropout | None = None,
    ) -> Tensor:
        """Return the output at each position of self-attention, the heads concatenated: [batch, length, width]."""
        length, head_width = self.query.shape[2:]
        full_length = length if positions is None else positions.length
        cos, sin = rotary.table(full_length, head_width, self.query.device)
        mask = None
        if positions is not None:
            cos, sin = (table[positions.position_BL].unsqueeze(1) for table in (cos, sin))
            mask = positions.mask(causal=causal)
        rotated = Heads(query=rotate(self.query, cos, sin), key=rotate(self.key, cos, sin), value=self.value)
        return rotated.mix_values(mask, causal=causal, positions=positions, dropout=dropout)

    def mix_values(
        self,
        mask: Tensor | None,
        *,
        causal: bool,
        positions: PositionTable | None = None,
        dropout: SequenceDropout | None = None,
    ) -> Tensor:
        """Return the weighted means of the values, the heads concatenated.

        `mask`: bool, where to attend; it has the causal order in it. None: everywhere, or in the past if causal.
        `positions`: of the vectors in their sequences, for `dropout` of the weights.
        """
        key, value = self._repeat_for_queries()
        is_causal = causal and mask is None
        if dropout is None:
            mixed = functional.scaled_dot_product_attention(self.query, key, value, attn_mask=mask, is_causal=is_causal)
            return mixed.transpose(1, 2).flatten(2)
        # torch's own function would draw from the global generator, which is not that of the run.
        scores = self.query @ key.mT * self.query.shape[-1] ** -0.5
        if is_causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        weights = dropout.drop_weights(scores.float().softmax(-1), positions).to(value.dtype)
        return (weights @ value).transpose(1, 2).flatten(2)

    def _repeat_for_queries(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of each query head: consecutive ones share them (arXiv:2305.13245)."""
        group_size = self.query.shape[1] // self.key.shape[1]
        if group_size == 1:
            return self.key, self.value
        return self.key.repeat_interleave(group_size, dim=1), self.value.repeat_interleave(group_size, dim=1)


def _divide_heads(x_BLX: Tensor, head_width: int) -> Tensor:
    batch, length, width = x_BLX.shape
    return x_BLX.view(batch, length, width // head_width, head_width).transpose(1, 2)


def init_linear(linear: nn.Linear, generator: Generator, *, scale: float = 1.0) -> None:
    """Draw normal weights with variance scale² / fan-in, and set the bias to 0 where there is one."""
    nn.init.normal_(linear.weight, std=scale * linear.in_features**-0.5, generator=generator)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
