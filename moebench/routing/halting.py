"""Halting: experts that stand one behind another, and a router that is asked after each whether a token goes on."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import Form, Router, RouterBuildContext


class HaltingRouter(Router):
    """Walks tokens through a chain of experts: h_0 = x, h_n = h_{n-1} + E_n(|h_{n-1}|), z_n = w·|h_n| + b.

    |h| is the state over its root mean square (see `Chain`); E_1 reads x as it is.

    The experts are the steps and there are at most E of them. A kind of halting says when a token stops and what its
    steps weigh. Alone, without a layer that brings the experts, the state stays x.
    """

    form = Form.CHAIN

    def __init__(self, config: Any, context: RouterBuildContext, start: float) -> None:
        """`start`: the bias b at the beginning."""
        super().__init__(config, context)
        self.gate = Gate(context.d_model, 1)
        self.bias = nn.Parameter(torch.empty(1))
        self.start = start

    def init_weights(self, generator: Generator) -> None:
        """Start with the bias that the algorithm names; the gate draws its own."""
        nn.init.constant_(self.bias, self.start)

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse a chain that leaves nothing to decide."""
        require(num_experts >= 2, "layout.num_experts", num_experts, f"at least 2 with router '{config.name}'")

    def walk(
        self, x_TD: Tensor, ctx: RouteContext, goes_on: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logits z_TN of all steps but the last, and ran_TE and last_TE (bool): the steps of each token.

        `goes_on`: z of the steps so far -> bool_T. No token is waited for: a step that nobody takes is one without
        rows, so that every process makes the same calls.
        """
        num_tokens = x_TD.shape[0]
        running_T = torch.ones(num_tokens, dtype=torch.bool, device=x_TD.device)
        running_T = running_T if ctx.valid_T is None else ctx.valid_T
        logits, ran = [x_TD.new_empty(num_tokens, 0, dtype=torch.float32)], [running_T]
        for step in range(self.num_experts):
            state_TD = x_TD if ctx.advance is None else ctx.advance(step, ran[-1])
            if step < self.num_experts - 1:  # the last step needs no decision
                logits.append(self.gate(state_TD) + self.bias.float())
                ran.append(ran[-1] & goes_on(torch.cat(logits, -1).detach()))
        ran_TE = torch.stack(ran, -1)
        last_TE = ran_TE & ~nn.functional.pad(ran_TE[:, 1:], (0, 1))
        return torch.cat(logits, -1), ran_TE, last_TE

    def flops_per_token(self) -> int:
        """Return those of the E - 1 decisions; they are made for tokens that have stopped too."""
        return (self.num_experts - 1) * super().flops_per_token()


def before(value_TN: Tensor) -> Tensor:
    """Return the sums over the steps before each step, and over all of them as a last column: [T, N + 1]."""
    return nn.functional.pad(value_TN.cumsum(-1), (1, 0))
