"""Feed-forward networks: one dense, and a bank of experts computed by grouped matrix products."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebench.experts.activation import GATED, activate
from moebench.experts.bank import Bank, draw_experts, local, merge
from moebench.experts.dropout import Dropout
from moebench.experts.grouped import grouped_matmul
from moebench.experts.mixture import mixture
from moebench.routing.values import Routing


def ffn_flops(d_model: int, width: int, activation: str) -> int:
    """Forward FLOPs of one token through a feed-forward network: 2 per weight; activations are not counted."""
    return 2 * d_model * width * (2 + GATED[activation])


class FeedForward(nn.Module):
    """The dense network: two projections around an activation, without biases."""

    def __init__(self, d_model: int, width: int, activation: str, out_scale: float = 1.0) -> None:
        """`out_scale`: factor on the initial output projection (residual depth scaling)."""
        super().__init__()
        self.activation = activation
        self.out_scale = out_scale
        self.w_in_DF = nn.Parameter(torch.empty(d_model, width * (1 + GATED[activation])))
        self.w_out_FD = nn.Parameter(torch.empty(width, d_model))

    def init_weights(self, generator: Generator) -> None:
        """Draw normal weights with variance 1 / fan-in."""
        draw(self.w_in_DF, self.w_in_DF.shape[0] ** -0.5, generator)
        draw(self.w_out_FD, self.out_scale * self.w_out_FD.shape[0] ** -0.5, generator)

    def forward(self, x_TD: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_TD."""
        hidden_TF = activate(x_TD @ self.w_in_DF, self.activation)
        return (hidden_TF if dropout is None else dropout(hidden_TF)) @ self.w_out_FD

    def flops_per_token(self) -> int:
        """Forward FLOPs of one token."""
        return 2 * (self.w_in_DF.numel() + self.w_out_FD.numel())


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

    def init_weights(self, generator: Generator) -> None:
        """Draw each expert as a dense network of its size is drawn: all experts differ."""
        draw_experts(self.w_in_EDF, self.w_in_EDF.shape[1] ** -0.5, generator)
        draw_experts(self.w_out_EFD, self.out_scale * self.w_out_EFD.shape[1] ** -0.5, generator)

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RD: the first load_E[0] rows through expert 0, the next through expert 1, and so on."""
        if self.recompute and dropout is None:
            y_RD: Tensor = checkpoint(self._rows, x_RD, load_E, use_reentrant=False)
            return y_RD
        return self._rows(x_RD, load_E, dropout)

    def _rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_RF = activate(grouped_matmul(x_RD, local(self.w_in_EDF), load_E), self.activation)
        return grouped_matmul(hidden_RF if dropout is None else dropout(hidden_RF), local(self.w_out_EFD), load_E)

    def mixture(
        self,
        x_TD: Tensor,
        routing: Routing,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        """Return y_TD by the fused path, which knows neither dropout nor other processes."""
        if dropout is not None or self.exchange is not None:
            return super().mixture(x_TD, routing, dropout, while_in_flight)
        weights = (self.w_in_EDF, self.w_out_EFD)
        y_TD: Tensor = mixture(x_TD, routing, *weights, self.activation, recompute=self.recompute)
        if while_in_flight is not None:
            while_in_flight()
        return y_TD

    def merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_GSD; with `recompute`, the merged networks are made again in the backward pass too."""
        if self.recompute and dropout is None:
            y_GSD: Tensor = checkpoint(self._merged, x_GSD, weight_GE, use_reentrant=False)
            return y_GSD
        return self._merged(x_GSD, weight_GE, dropout)

    def _merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_GSF = activate(x_GSD @ merge(weight_GE, self.w_in_EDF), self.activation)
        return (hidden_GSF if dropout is None else dropout(hidden_GSF)) @ merge(weight_GE, self.w_out_EFD)

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes."""
        return activate(x_RD @ self.w_in_EDF[index], self.activation) @ self.w_out_EFD[index]

    def elements_per_row(self) -> int:
        """Numbers that a row for another process carries, there and back."""
        return self.w_in_EDF.shape[1] + self.w_out_EFD.shape[2]

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert."""
        return (2 * (self.w_in_EDF.numel() + self.w_out_EFD.numel()) // self.num_experts,) * self.num_experts


def draw(parameter: Tensor, std: float, generator: Generator) -> None:
    """Fill a parameter in place from a normal distribution."""
    nn.init.normal_(parameter, std=std, generator=generator)
