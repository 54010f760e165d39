"""Halting routers: the experts form a chain, and after each expert the router decides whether a token continues."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import Form, Router, RouterBuildContext


class HaltingRouter(Router):
    """Run tokens through a chain of experts: h_0 = x, h_n = h_{n-1} + E_n(|h_{n-1}|), z_n = w·|h_n| + b.

    |h| is the state divided by its root mean square (`divide_by_rms` in `experts.bank_pass`); E_1 reads x itself. Each
    expert is one step, so a token takes at most E steps. A subclass defines when a token stops and how its steps are
    weighted. Without a layer that computes the experts (`ctx.advance` is None) the state remains x.
    """

    form = Form.CHAIN

    def __init__(self, config: Any, context: RouterBuildContext, initial_bias: float) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, 1)
        self.bias = nn.Parameter(torch.empty(1))
        self.initial_bias = initial_bias
        self.halting_shift = 0.0
        """Added to the halting logits of all steps."""

    def init_weights(self, generator: Generator) -> None:
        """Initialise the bias b; the gate initialises itself."""
        nn.init.constant_(self.bias, self.initial_bias)

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        require(num_experts >= 2, "layout.num_experts", num_experts, f"at least 2 with router '{config.name}'")

    def run_chain(
        self, x_TD: Tensor, ctx: RouteContext, continues: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run every token until it stops.

        `continues`: maps the logits z of the steps so far, [T, n], to bool [T]. Returns the logits z_TN of all steps
        but the last (N = E - 1), ran_TE (bool: steps that a token takes) and last_TE (bool: its last step). All E steps
        are called even if no token takes them, so that every process makes the same collective calls.
        """
        num_tokens = x_TD.shape[0]
        running_T = torch.ones(num_tokens, dtype=torch.bool, device=x_TD.device)
        running_T = running_T if ctx.valid_T is None else ctx.valid_T
        logits, ran = [x_TD.new_empty(num_tokens, 0, dtype=torch.float32)], [running_T]
        for step in range(self.num_experts):
            state_TD = x_TD if ctx.advance is None else ctx.advance(step, ran[-1])
            if step < self.num_experts - 1:  # the last step needs no decision
                logits.append(self.gate(state_TD) + self.bias.float() + self.halting_shift)
                ran.append(ran[-1] & continues(torch.cat(logits, -1).detach()))
        ran_TE = torch.stack(ran, -1)
        last_TE = ran_TE & ~nn.functional.pad(ran_TE[:, 1:], (0, 1))
        return torch.cat(logits, -1), ran_TE, last_TE

    @override
    def flops_per_token(self) -> int:
        return (self.num_experts - 1) * super().flops_per_token()  # decisions are computed for stopped tokens too


def exclusive_cumsum(value_TN: Tensor) -> Tensor:
    """Return the sum over the steps before each step, with the sum over all steps as last column: [T, N + 1]."""
    return nn.functional.pad(value_TN.cumsum(-1), (1, 0))
