"""Multi-head self-attention with rotary positions."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.experts.feed_forward import draw


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
        """Draw normal weights with variance 1 / fan-in, the output scaled for the depth of the residual stream."""
        draw(self.qkv.weight, self.qkv.in_features**-0.5, generator)
        draw(self.out.weight, self.out_scale * self.out.in_features**-0.5, generator)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attention output, without the residual."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.transpose(1, 3).unbind(2)  # each batch, head, length, head width
        cos, sin = rotation(length, width // self.num_heads, self.rope_theta, x_BLD.device)
        mixed = functional.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, is_causal=self.causal
        )
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return out

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of one token in a sequence of `length`; the masked half is counted, as kernels differ."""
        width = self.out.in_features
        return 2 * (self.qkv.weight.numel() + self.out.weight.numel()) + 4 * length * width


def rotation(length: int, head_width: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin [length, head_width / 2] of the rotary angles (arXiv:2104.09864, eq. 15), fp32."""
    power = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), theta**-power)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (first half, second half) of the head dimension by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
