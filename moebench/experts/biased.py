"""Feed-forward experts with biases: each expert has its own, added to its rows after the grouped products.

The fused path has no biases: a bank with them dispatches, computes and combines in separate steps, as with dropout.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from typing_extensions import override

from moebench.experts.activation import Dropout, activate
from moebench.experts.bank import Bank, local_shard, merge_weights, read_weight
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.grouped import grouped_matmul
from moebench.routing.values import Routing


class BiasedExpertBank(ExpertBank):
    """E feed-forward networks of one shape, both of whose projections have biases."""

    def __init__(self, d_model: int, width: int, num_experts: int, activation: str, **options: Any) -> None:
        """`options`: those of `ExpertBank`."""
        super().__init__(d_model, width, num_experts, activation, **options)
        self.b_in_EF = nn.Parameter(torch.empty(num_experts, self.w_in_EDF.shape[2]))
        self.b_out_ED = nn.Parameter(torch.empty(num_experts, d_model))

    @override
    def init_weights(self, generator: Generator) -> None:
        super().init_weights(generator)
        zero_biases(self.b_in_EF, self.b_out_ED)

    @override
    def _rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_RF = grouped_matmul(x_RD, read_weight(self.w_in_EDF), load_E)
        hidden_RF = activate(add_expert_bias(hidden_RF, local_shard(self.b_in_EF), load_E), self.activation)
        hidden_RF = hidden_RF if dropout is None else dropout(hidden_RF)
        y_RD = grouped_matmul(hidden_RF, read_weight(self.w_out_EFD), load_E)
        return add_expert_bias(y_RD, local_shard(self.b_out_ED), load_E)

    @override
    def mixture(
        self,
        x_TD: Tensor,
        routing: Routing,
        dropout: Dropout | None = None,
        while_in_flight: Callable[[], None] | None = None,
    ) -> Tensor:
        return Bank.mixture(self, x_TD, routing, dropout, while_in_flight)

    @override
    def sends_weights(self, *, has_dropout: bool) -> bool:
        return False

    @override
    def _compute_merged(self, x_GSD: Tensor, weight_GE: Tensor, dropout: Dropout | None = None) -> Tensor:
        hidden_GSF = x_GSD @ merge_weights(weight_GE, read_weight(self.w_in_EDF))
        hidden_GSF = activate(_add_merged(hidden_GSF, weight_GE, self.b_in_EF), self.activation)
        hidden_GSF = hidden_GSF if dropout is None else dropout(hidden_GSF)
        y_GSD = hidden_GSF @ merge_weights(weight_GE, read_weight(self.w_out_EFD))
        return _add_merged(y_GSD, weight_GE, self.b_out_ED)

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        hidden_RF = activate(x_RD @ self.w_in_EDF[index] + self.b_in_EF[index], self.activation)
        return hidden_RF @ self.w_out_EFD[index] + self.b_out_ED[index]


def zero_biases(*parameters: Tensor | None) -> None:
    """Set stacks of biases to 0, where there are any: on this process, if they are sharded."""
    with torch.no_grad():
        for parameter in parameters:
            if parameter is not None:
                local_shard(parameter).zero_()


def add_expert_bias(x_RO: Tensor, bias_EO: Tensor, load_E: Tensor) -> Tensor:
    """Add to each row the bias of its expert, rows sorted by expert, in the precision of the rows."""
    biased_RO: Tensor = _AddExpertBias.apply(x_RO, bias_EO.to(x_RO.dtype), load_E)  # type: ignore[no-untyped-call]
    return biased_RO


class _AddExpertBias(torch.autograd.Function):
    """x_r + b_e(r). The gradient of a bias is a sum over a run of rows, in a fixed order on every device."""

    @staticmethod
    def forward(ctx: Any, x_RO: Tensor, bias_EO: Tensor, load_E: Tensor) -> Tensor:
        ctx.save_for_backward(load_E)
        row_R = torch.arange(x_RO.shape[0], device=x_RO.device)
        # Rows after those of the last expert belong to no assignment; they get any bias.
        expert_R = torch.searchsorted(load_E.cumsum(0), row_R, right=True).clamp(max=len(load_E) - 1)
        return x_RO + bias_EO.index_select(0, expert_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RO: Tensor) -> tuple[Tensor, Tensor, None]:
        (load_E,) = ctx.saved_tensors
        if grad_RO.shape[0] == 0:
            return grad_RO, grad_RO.new_zeros(len(load_E), grad_RO.shape[1]), None
        row_R = torch.arange(grad_RO.shape[0], device=grad_RO.device)
        start = functional.pad(load_E.cumsum(0), (1, 0))  # the last start is that of rows that belong to no expert
        return grad_RO, functional.embedding_bag(row_R, grad_RO, start, mode="sum")[:-1], None


def _add_merged(y_GSO: Tensor, weight_GE: Tensor, bias_EO: Tensor) -> Tensor:
    """Add to the rows of each segment the biases of the experts, summed with its weights."""
    merged_GO = weight_GE.to(bias_EO.dtype) @ bias_EO
    return y_GSO + merged_GO.to(y_GSO.dtype).unsqueeze(1)
