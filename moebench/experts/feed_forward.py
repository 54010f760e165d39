"""Feed-forward networks: one dense, and a bank of experts computed by grouped matrix products."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from typing_extensions import override

from moebench.experts.activation import GATED, Dropout, activate
from moebench.experts.bank import Bank, init_experts, merge_weights, read_weight
from moebench.experts.dispatch import DispatchPlan, cast_row_weights, dispatch
from moebench.experts.fused import compute_fused_mixture
from moebench.experts.grouped import cast_for_autocast, grouped_matmul
from moebench.experts.weighted_rows import WeightedExperts, sum_rows
from moebench.routing.linear_map import INPUT_FIRST, LinearMap
from moebench.routing.values import Routing


def ffn_flops(d_model: int, width: int, activation: str) -> int:
    """Return the forward FLOPs of one token through a feed-forward network: 2 per weight; activations are left out."""
    return 2 * d_model * width * (2 + GATED[activation])


def describe_maps(width: int, activation: str, names: Sequence[str]) -> dict[str, LinearMap]:
    """Return the maps of the input and the output projection of these names; a gated input has two parts."""
    name_in, name_out = names
    parts = (width, width) if GATED[activation] else ()
    return {name_in: replace(INPUT_FIRST, out_parts=parts), name_out: INPUT_FIRST}


@dataclass(frozen=True, kw_only=True)
class NetworkStyle:
    """What the feed-forward networks of a model have in common, dense ones and experts alike."""

    d_model: int
    activation: str
    out_scale: float = 1.0
    """Factor on the initial output projection (residual depth scaling)."""
    bias: bool = False
    """Whether both projections have biases."""

    def build(self, width: int) -> "FeedForward":
        """Build a dense network."""
        return FeedForward(self.d_model, width, self.activation, self.out_scale, bias=self.bias)


class FeedForward(nn.Module):
    """The dense network: two projections around an activation."""

    def __init__(
        self, d_model: int, width: int, activation: str, out_scale: float = 1.0, *, bias: bool = False
    ) -> None:
        """`out_scale`: factor on the initial output projection (residual depth scaling)."""
        super().__init__()
        self.activation = activation
        self.out_scale = out_scale
        self.w_in_DF = nn.Parameter(torch.empty(d_model, width * (1 + GATED[activation])))
        self.w_out_FD = nn.Parameter(torch.empty(width, d_model))
        self.b_in_F = nn.Parameter(torch.empty(self.w_in_DF.shape[1])) if bias else None
        self.b_out_D = nn.Parameter(torch.empty(d_model)) if bias else None

    def init_weights(self, generator: Generator) -> None:
        """Initialise with normal weights of variance 1 / fan-in, and biases of 0."""
        nn.init.normal_(self.w_in_DF, std=self.w_in_DF.shape[0] ** -0.5, generator=generator)
        nn.init.normal_(self.w_out_FD, std=self.out_scale * self.w_out_FD.shape[0] ** -0.5, generator=generator)
        if self.b_in_F is not None and self.b_out_D is not None:
            nn.init.zeros_(self.b_in_F)
            nn.init.zeros_(self.b_out_D)

    def forward(self, x_TD: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_TD."""
        hidden_TF = activate(_add_bias(x_TD @ read_weight(self.w_in_DF), self.b_in_F), self.activation)
        hidden_TF = hidden_TF if dropout is None else dropout(hidden_TF)
        return _add_bias(hidden_TF @ read_weight(self.w_out_FD), self.b_out_D)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the projections are in the parameters."""
        return describe_maps(self.w_out_FD.shape[0], self.activation, ("w_in_DF", "w_out_FD"))

    def flops_per_token(self) -> int:
        """Return the forward FLOPs of one token."""
        return 2 * (self.w_in_DF.numel() + self.w_out_FD.numel())


def _add_bias(y_TO: Tensor, bias_O: Tensor | None) -> Tensor:
    """Return the product with its bias, in the precision of the product."""
    return y_TO if bias_O is None else y_TO + bias_O.to(y_TO.dtype)


class ExpertBank(Bank):
    """E feed-forward networks of one shape."""

    def __init__(
        self,
        d_model: int,
        width: int,
        num_experts: int,
        activation: str,
        out_scale: float = 1.0,
        *,
        recompute: bool = False,
    ) -> None:
        """`recompute`: compute the activation again in the backward pass instead of keeping it."""
        super().__init__()
        self.recompute = recompute
        self.num_experts = num_experts
        self.activation = activation
        self.out_scale = out_scale
        self.w_in_EDF = nn.Parameter(torch.empty(num_experts, d_model, width * (1 + GATED[activation])))
        self.w_out_EFD = nn.Parameter(torch.empty(num_experts, width, d_model))

    @override
    def init_weights(self, generator: Generator) -> None:
        # Each expert like a dense network of its size: all experts differ.
        init_experts(self.w_in_EDF, self.w_in_EDF.shape[1] ** -0.5, generator)
        init_experts(self.w_out_EFD, self.out_scale * self.w_out_EFD.shape[1] ** -0.5, generator)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the projections are in the parameters."""
        return describe_maps(self.w_out_EFD.shape[1], self.activation, ("w_in_EDF", "w_out_EFD"))

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        if self.recompute and dropout is None:
            y_RD: Tensor = checkpoint(self._rows, x_RD, load_E, use_reentrant=False)
            return y_RD
        return self._rows(x_RD, load_E, dropout)

    def _rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_RF = activate(grouped_matmul(x_RD, read_weight(self.w_in_EDF), load_E), self.activation)
        hidden_RF = hidden_RF if dropout is None else dropout(hidden_RF)
        return grouped_matmul(hidden_RF, read_weight(self.w_out_EFD), load_E)

    @override
    def mixture(
        self,
        x_TD: Tensor,
        routing: Routing,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        if self.sends_weights(has_dropout=dropout is not None):
            return self._mixture_elsewhere(x_TD, routing, while_in_flight)
        if dropout is not None or self.exchange is not None:  # the fused path has no dropout
            return super().mixture(x_TD, routing, dropout, while_in_flight)
        weights = read_weight(self.w_in_EDF), read_weight(self.w_out_EFD)
        return compute_fused_mixture(x_TD, routing, *weights, self.activation, recompute=self.recompute)

    def _mixture_elsewhere(self, x_TD: Tensor, routing: Routing, while_in_flight: Callable[[], None] | None) -> Tensor:
        """Return the mixture of experts that are sharded over processes."""
        assert self.exchange is not None
        (x_TD,) = cast_for_autocast(x_TD)
        weights = read_weight(self.w_in_EDF), read_weight(self.w_out_EFD)
        experts = WeightedExperts(w_in_EDF=weights[0], w_out_EFD=weights[1], activation=self.activation)
        plan = DispatchPlan.of(routing)
        rows = dispatch(x_TD, plan), plan.weight_R(cast_row_weights(routing.weight_N, x_TD))
        y_RD = self.exchange.compute_weighted(experts, rows, plan.groups.load_E, while_in_flight)
        return sum_rows(y_RD, plan)

    @override
    def sends_weights(self, *, has_dropout: bool) -> bool:
        # With `recompute` nothing but the rows is kept, which the step-by-step path does.
        return self.exchange is not None and not has_dropout and not self.recompute

    @override
    def compute_merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        # With `recompute`, the merged networks are made again in the backward pass too.
        if self.recompute and dropout is None:
            y_GSD: Tensor = checkpoint(self._compute_merged, x_GSD, weight_GE, use_reentrant=False)
            return y_GSD
        return self._compute_merged(x_GSD, weight_GE, dropout)

    def _compute_merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_GSF = activate(x_GSD @ merge_weights(weight_GE, read_weight(self.w_in_EDF)), self.activation)
        hidden_GSF = hidden_GSF if dropout is None else dropout(hidden_GSF)
        return hidden_GSF @ merge_weights(weight_GE, read_weight(self.w_out_EFD))

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        return activate(x_RD @ self.w_in_EDF[index], self.activation) @ self.w_out_EFD[index]

    @override
    def elements_per_row(self) -> int:
        return self.w_in_EDF.shape[1] + self.w_out_EFD.shape[2]

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (2 * (self.w_in_EDF.numel() + self.w_out_EFD.numel()) // self.num_experts,) * self.num_experts
