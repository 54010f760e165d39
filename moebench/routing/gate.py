"""The gate: the linear projection from token vectors to router logits, and the noise that routers add to it."""

import math

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.linear_map import OUTPUT_FIRST, LinearMap

TRUNCATION = 2.0
"""Bound of the truncated normal distribution of initial weights, in standard deviations."""
TRUNCATED_STD = math.sqrt(
    1 - TRUNCATION * math.sqrt(2 / math.pi) * math.exp(-(TRUNCATION**2) / 2) / math.erf(TRUNCATION / math.sqrt(2))
)
"""Standard deviation of a standard normal distribution truncated at that bound: 0.8796."""


class Gate(nn.Module):
    """A linear projection x_TD -> logits_TE that computes in fp32 in every precision."""

    def __init__(self, d_model: int, num_experts: int, init_scale: float = 0.1, *, bias: bool = False) -> None:
        """Allocate the weights.

        `init_scale`: variance of the initial weights before truncation, times d_model. Switch divides the usual scale
        of 1 by 10 (arXiv:2101.03961, section 2.4). As in its code (mesh-TensorFlow) the normal distribution is
        truncated at two standard deviations, which leaves 77 % of the variance: 0.0774 for 0.1.
        `bias`: add a bias for each output, initially 0.
        """
        super().__init__()
        self.weight_ED = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias_E = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.init_std = math.sqrt(init_scale / d_model)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the weights from the truncated normal distribution; an `init_scale` of 0 gives zeros."""
        if self.bias_E is not None:
            nn.init.zeros_(self.bias_E)
        if self.init_std == 0:
            nn.init.zeros_(self.weight_ED)
            return
        bound = TRUNCATION * self.init_std
        nn.init.trunc_normal_(self.weight_ED, std=self.init_std, a=-bound, b=bound, generator=generator)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the map is in the parameters."""
        return {"weight_ED": OUTPUT_FIRST}

    @property
    def initial_logit_std(self) -> float:
        """Standard deviation of the initial logits of tokens with a mean square of 1."""
        return self.init_std * TRUNCATED_STD * math.sqrt(self.weight_ED.shape[1])

    @override
    def forward(self, x_TD: Tensor) -> Tensor:
        return functional.linear(
            x_TD.float(), self.weight_ED.float(), None if self.bias_E is None else self.bias_E.float()
        )


def jitter(x_TD: Tensor, amount: float, ctx: RouteContext) -> Tensor:
    """Multiply each element by U(1 - amount, 1 + amount); returns a new tensor, so the experts see the original."""
    if amount == 0:
        return x_TD
    return x_TD * (1 + amount * (2 * ctx.uniform(*x_TD.shape) - 1))


def uniform_to_gumbel(uniform: Tensor) -> Tensor:
    """Transform uniform draws to standard Gumbel noise: the argmax of logits plus noise samples from their softmax."""
    return -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
