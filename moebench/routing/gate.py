"""The gate: the projection from token vectors to router logits."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.routing.context import RouteContext


class Gate(nn.Module):
    """A linear projection x_TD -> logits_TE in fp32, whatever the precision around it."""

    def __init__(self, d_model: int, num_experts: int, init_scale: float = 0.1, *, bias: bool = False) -> None:
        """`init_scale`: variance of the weights times d_model (Switch uses 0.1 of the usual 1, section 2.4).

        `bias`: add a number for each output, 0 at the start.
        """
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias_E = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.init_std = (init_scale / d_model) ** 0.5

    def init_weights(self, generator: Generator) -> None:
        """Draw the weights from a normal distribution cut at two standard deviations; a scale of 0 gives zeros."""
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)
        if self.init_std == 0:
            nn.init.zeros_(self.weight_ED)
            return
        nn.init.trunc_normal_(
            self.weight_ED, std=self.init_std, a=-2 * self.init_std, b=2 * self.init_std, generator=generator
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits_TE in fp32."""
        return functional.linear(
            x_TD.float(), self.weight_ED.float(), None if self.bias_E is None else self.bias_E.float()
        )


def jitter(x_TD: Tensor, amount: float, ctx: RouteContext) -> Tensor:
    """Return a copy of x times U(1 - amount, 1 + amount), each element on its own; the experts see the original."""
    if amount == 0:
        return x_TD
    return x_TD * (1 + amount * (2 * ctx.uniform(*x_TD.shape) - 1))


def gumbel(uniform: Tensor) -> Tensor:
    """Return standard Gumbel noise from uniform draws: the argmax of logits plus it is a draw from their softmax."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
