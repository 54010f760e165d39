"""The gate: the projection from token vectors to router logits."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.routing.context import RouteContext

CUT = 2.0
"""Standard deviations at which draws of weights are cut off."""
CUT_STD = math.sqrt(1 - CUT * math.sqrt(2 / math.pi) * math.exp(-(CUT**2) / 2) / math.erf(CUT / math.sqrt(2)))
"""Standard deviation of what the cut leaves of a standard normal distribution, 0.8796."""


class Gate(nn.Module):
    """A linear projection x_TD -> logits_TE in fp32, whatever the precision around it."""

    def __init__(self, d_model: int, num_experts: int, init_scale: float = 0.1, *, bias: bool = False) -> None:
        """`init_scale`: variance times d_model of the normal distribution that the weights are drawn from.

        Switch uses 0.1 of the usual 1 (section 2.4). As in its code, mesh-TensorFlow, draws beyond two standard
        deviations are made again, which leaves 77 % of the variance: 0.0774 for 0.1. `bias`: add a number for each
        output, 0 at the start.
        """
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias_E = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.init_std = math.sqrt(init_scale / d_model)

    def init_weights(self, generator: Generator) -> None:
        """Draw the weights from a normal distribution cut at two standard deviations; a scale of 0 gives zeros."""
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)
        if self.init_std == 0:
            nn.init.zeros_(self.weight_ED)
            return
        nn.init.trunc_normal_(
            self.weight_ED, std=self.init_std, a=-CUT * self.init_std, b=CUT * self.init_std, generator=generator
        )

    @property
    def start_std(self) -> float:
        """Standard deviation of the logits at the start, for tokens whose mean square is 1."""
        return self.init_std * CUT_STD * math.sqrt(self.weight_ED.shape[1])

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
