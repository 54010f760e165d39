"""A bank: E experts that compute what a routing says. The kinds of banks differ in what an expert is."""

from typing import ClassVar

import torch
from torch import Generator, Tensor, nn

from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.dropout import Dropout
from moebench.routing.values import Routing


class Bank(nn.Module):
    """E experts x_D -> y_D behind one way of computing a routing: dispatch, the experts on sorted rows, combine.

    A kind of expert defines `rows`, `expert`, `init_weights` and `flops_per_row_E`; one that can do better than row
    by row overrides `mixture`.
    """

    num_experts: int
    reads_loads: ClassVar[bool] = False
    """Python must know each expert's number of rows: a GPU is waited for, and no row is left to nobody."""

    def init_weights(self, generator: Generator) -> None:
        """Draw the weights of all experts."""
        raise NotImplementedError

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD: the first load_E[0] rows through expert 0, the next through expert 1, and so on.

        `dropout` is for hidden activations inside the experts.
        """
        raise NotImplementedError

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes: the slow, obvious form that the oracle of the tests uses."""
        raise NotImplementedError

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert."""
        raise NotImplementedError

    def mixture(self, x_TD: Tensor, routing: Routing, dropout: Dropout | None = None) -> Tensor:
        """Return y_TD: for each token the sum of its experts' outputs times their weights (0 when unserved)."""
        routing = routing.compact() if self.reads_loads else routing
        plan = DispatchPlan.of(routing)
        y_RD = self.rows(dispatch(x_TD, plan), plan.groups.load_E, dropout)
        return combine(y_RD, routing.weight_N, plan)


def double_loop(bank: Bank, x_TD: Tensor, routing: Routing) -> Tensor:
    """Return Σ_e w_te E_e(x_t) by a loop over assignments: slow, obvious, the oracle beside the fast path."""
    routing = routing.compact()
    tokens = list(x_TD * 0)
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True)
    for token, expert, weight in pairs:
        tokens[token] = tokens[token] + weight.to(x_TD.dtype) * bank.expert(x_TD[token], expert)
    return torch.stack(tokens) if tokens else x_TD * 0
