"""One forward pass of a bank of experts over a batch of tokens, as a routing requests it."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank
from moebench.routing.selection import can_read_without_waiting
from moebench.routing.values import Routing

MAX_LISTED = 4
"""Assignments listed, per one that is expected to be used, up to which unused ones have rows on a GPU."""


class BankPass:
    """The experts of a layer in one forward pass (`routing.abstract.ExpertPass`).

    In a chain the experts are steps, h_0 = x, h_n = h_{n-1} + E_n(norm h_{n-1}), and the router decides between them
    which tokens continue. From the second step on an expert reads the state at unit scale, as the blocks of a pre-norm
    transformer do: without a norm, a long chain of gated experts explodes. The first reads x, whose norm is outside.
    """

    def __init__(
        self,
        bank: Bank,
        x_TD: Tensor,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
        experts_per_token: float = math.inf,
    ) -> None:
        """`while_in_flight`: called once while rows are on their way to other processes, if any are.

        `experts_per_token`: how many experts a token is expected to use; infinity: all that are listed.
        """
        self.bank = bank
        self.x_TD = x_TD
        self.dropout = dropout
        self.while_in_flight = while_in_flight
        self.experts_per_token = experts_per_token
        self.added: list[Tensor] = []
        self.state_TD = self.read_TD = x_TD
        device = x_TD.device.type
        self.precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def mix(self, routing: Routing) -> Tensor:
        """Return y_TD: for each token the weighted sum of its experts' outputs; 0 for an unserved token."""
        return self.bank.mixture(self.x_TD, self._shorten(routing), self.dropout, self.while_in_flight)

    def _shorten(self, routing: Routing) -> Routing:
        """Return the routing without unused assignments if they are most of a long list, on a device that waits for it.

        Elsewhere they take memory at most, and are not computed.
        """
        is_long = routing.expert_N.numel() > MAX_LISTED * self.experts_per_token * routing.num_tokens
        return routing if can_read_without_waiting(routing.expert_N.device) or not is_long else routing.compact()

    def compute_rows(self, x_RD: Tensor, load_E: Tensor) -> Tensor:
        """Return y_RD for rows sorted by expert."""
        y_RD: Tensor = self.bank(x_RD, load_E, self.dropout, self.while_in_flight)
        return y_RD

    def compute_merged(self, x_GSD: Tensor, weight_GE: Tensor) -> Tensor:
        """Return y_GSD: the rows of each segment through one network with the parameters Σ_e w_ge θ_e."""
        return self.bank.compute_merged(x_GSD, weight_GE, self.dropout)

    def advance(self, step: int, running_T: Tensor) -> Tensor:
        """Compute one step of a chain for the running tokens; return the state of all that the next one reads, fp32."""
        num_tokens, device = running_T.shape[0], running_T.device
        expert_T1 = torch.full((num_tokens, 1), step, device=device)
        weight_T1 = torch.ones(num_tokens, 1, device=device)
        routing = Routing.from_top_k(expert_T1, weight_T1, num_experts=self.bank.num_experts)
        # The router runs in fp32, the experts compute in the precision around the layer.
        with torch.autocast(device.type, dtype=self.precision, enabled=self.precision is not None):
            added_TD = self.bank.mixture(self.read_TD, routing.keep(running_T), self.dropout)
        self.added.append(added_TD)
        self.state_TD = self.state_TD + added_TD
        self.read_TD = divide_by_rms(self.state_TD)
        return self.read_TD.float()


def divide_by_rms(x_RD: Tensor) -> Tensor:
    """Return the vectors divided by their root mean square."""
    return functional.rms_norm(x_RD, x_RD.shape[-1:])
