"""Multi-head attention: within a sequence with rotary positions, and from a decoder to the output of an encoder."""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.experts.projection import attention_score_flops


@dataclass(frozen=True, kw_only=True, eq=False)
class PositionTable:
    """Positions of the vectors of a batch in their sequences, where some are missing or padding."""

    position_BL: Tensor
    """int64: position in the full sequence."""
    valid_BL: Tensor
    """bool: False where there is no vector; at least one of each sequence is True."""
    length: int
    """Length of the full sequences."""
    document_BL: Tensor | None = None
    """int64: the document that each vector is of; it attends only to vectors of its own. None: to all."""

    @classmethod
    def of_documents(cls, document_BL: Tensor) -> "PositionTable":
        """Return the positions of full sequences of several documents, without padding.

        They continue over documents: rotary attention sees only differences of positions inside one.
        """
        table = cls.of_padded(torch.ones_like(document_BL, dtype=torch.bool))
        return replace(table, document_BL=document_BL)

    @classmethod
    def of_padded(cls, valid_BL: Tensor) -> "PositionTable":
        """Return the positions of full sequences with padding; in one of padding alone the first position counts."""
        length = valid_BL.shape[1]
        position_BL = torch.arange(length, device=valid_BL.device).expand_as(valid_BL)
        first_L = torch.arange(length, device=valid_BL.device) == 0
        valid_BL = valid_BL | (first_L & ~valid_BL.any(1, keepdim=True))
        return cls(position_BL=position_BL, valid_BL=valid_BL, length=length)

    def mask(self, *, causal: bool) -> Tensor | None:
        """Return which vectors each one attends to, bool [B, 1, L or 1, L]; None: all, or all earlier ones if causal.

        In a causal model, padding after the last vector is in the future of all; otherwise it must be masked.
        """
        if self.document_BL is None:
            return None if causal else self.valid_BL[:, None, None, :]
        mask_BLL = self.document_BL.unsqueeze(2) == self.document_BL.unsqueeze(1)
        mask_BLL = mask_BLL.tril() if causal else mask_BLL & self.valid_BL.unsqueeze(1)
        return mask_BLL.unsqueeze(1)


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


class Attention(nn.Module):
    """Softmax attention over the whole sequence, or over the past when causal."""

    def __init__(self, d_model: int, num_heads: int, *, causal: bool, rope_theta: float, out_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.rope_theta = rope_theta
        self.out_scale = out_scale
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_weights(self, generator: Generator) -> None:
        """Initialise normally with variance 1 / fan-in; the output is scaled for the depth of the residual stream."""
        nn.init.normal_(self.qkv.weight, std=self.qkv.in_features**-0.5, generator=generator)
        nn.init.normal_(self.out.weight, std=self.out_scale * self.out.in_features**-0.5, generator=generator)

    def forward(self, x_BLD: Tensor, positions: PositionTable | None = None) -> Tensor:
        """Return the attention output, without the residual; `positions`: for parts of sequences or padding."""
        query, key, value = split_heads(self.qkv(x_BLD), self.num_heads)
        mixed_BLD = attend(query, key, value, causal=self.causal, rope_theta=self.rope_theta, positions=positions)
        out: Tensor = self.out(mixed_BLD)
        return out

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`, the masked half included."""
        weights = self.qkv.weight.numel() + self.out.weight.numel()
        return 2 * weights + attention_score_flops(length, self.out.in_features)


class CrossAttention(nn.Module):
    """Softmax attention of each position of a decoder over the output of its encoder; without positions, as in T5."""

    def __init__(self, d_model: int, num_heads: int, *, out_scale: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.out_scale = out_scale
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key_value = nn.Linear(d_model, 2 * d_model, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_weights(self, generator: Generator) -> None:
        """Initialise as self-attention does."""
        for projection in (self.query, self.key_value):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)
        nn.init.normal_(self.out.weight, std=self.out_scale * self.out.in_features**-0.5, generator=generator)

    def forward(self, x_BLD: Tensor, encoder_output: EncoderOutput) -> Tensor:
        """Return the attention output for each position, without the residual."""
        batch, length, width = x_BLD.shape
        head_width = width // self.num_heads
        query = self.query(x_BLD).view(batch, length, self.num_heads, head_width).transpose(1, 2)
        key_value = self.key_value(encoder_output.x_BMD).view(batch, -1, 2, self.num_heads, head_width)
        key, value = key_value.transpose(1, 3).unbind(2)
        valid_BM = encoder_output.valid_BM
        mask = None if valid_BM is None else valid_BM[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out

    def flops(self, length: int, encoder_length: int) -> int:
        """Return the forward FLOPs of one sequence of `length` that attends to `encoder_length` vectors."""
        weights = self.query.weight.numel() + self.out.weight.numel()
        per_position = 2 * weights + attention_score_flops(encoder_length, self.out.in_features)
        return length * per_position + encoder_length * 2 * self.key_value.weight.numel()


def split_heads(qkv_BLO: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [batch, head, length, head width], from one projection of all three."""
    batch, length, width = qkv_BLO.shape
    qkv = qkv_BLO.view(batch, length, 3, num_heads, width // (3 * num_heads))
    query, key, value = qkv.transpose(1, 3).unbind(2)
    return query, key, value


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool,
    rope_theta: float,
    positions: PositionTable | None = None,
) -> Tensor:
    """Return the attention output of each position, the heads concatenated: [batch, length, heads · head width]."""
    _, _, length, head_width = query.shape
    full_length = length if positions is None else positions.length
    cos, sin = rotary_table(full_length, head_width, rope_theta, query.device)
    mask = None
    if positions is not None:
        cos, sin = (table[positions.position_BL].unsqueeze(1) for table in (cos, sin))
        mask = positions.mask(causal=causal)
    mixed = functional.scaled_dot_product_attention(
        rotate(query, cos, sin), rotate(key, cos, sin), value, attn_mask=mask, is_causal=causal and mask is None
    )
    return mixed.transpose(1, 2).flatten(2)


def rotary_table(length: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [length, head_width / 2] of the rotary angles (arXiv:2104.09864, eq. 15), fp32."""
    power = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), theta**-power)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (first half, second half) of the head dimension by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
