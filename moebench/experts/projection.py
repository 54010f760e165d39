"""Banks for attention: experts that are projections, and experts that are attention heads."""

import math

import torch
from torch import Generator, Tensor, nn

from moebench.experts.bank import Bank, draw_experts, local
from moebench.experts.dropout import Dropout
from moebench.experts.grouped import grouped_matmul
from moebench.routing.values import LayerRecord, Routing


class ProjectionBank(Bank):
    """E matrices x_D -> y_O without an activation."""

    def __init__(self, d_model: int, out_width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight_EDO = nn.Parameter(torch.empty(num_experts, d_model, out_width))

    def init_weights(self, generator: Generator) -> None:
        """Draw each expert as a dense projection is drawn: variance 1 / fan-in."""
        draw_experts(self.weight_EDO, self.weight_EDO.shape[1] ** -0.5, generator)

    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        """Return y_RO, rows sorted by expert; there is no hidden activation to drop."""
        return grouped_matmul(x_RD, local(self.weight_EDO), load_E)

    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        """Return what one expert computes."""
        return x_RD @ self.weight_EDO[index]

    def elements_per_row(self) -> int:
        """Numbers that a row for another process carries, there and back."""
        return self.weight_EDO.shape[1] + self.weight_EDO.shape[2]

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert."""
        return (2 * self.weight_EDO.numel() // self.num_experts,) * self.num_experts


class HeadBank(Bank):
    """E experts that are attention heads: a query and an output projection each; keys and values are not theirs.

    What an expert computes depends on the sequence, so there is no `rows`: `queries` come before the attention,
    `outputs` after it (see `models.expert_attention`).
    """

    def __init__(self, d_model: int, head_width: int, num_experts: int, out_scale: float) -> None:
        """`head_width`: of all heads of one expert together."""
        super().__init__()
        self.num_experts = num_experts
        self.out_scale = out_scale
        self.w_query_EDH = nn.Parameter(torch.empty(num_experts, d_model, head_width))
        self.w_out_EHD = nn.Parameter(torch.empty(num_experts, head_width, d_model))

    def init_weights(self, generator: Generator) -> None:
        """Draw each expert as dense heads are drawn."""
        draw_experts(self.w_query_EDH, self.w_query_EDH.shape[1] ** -0.5, generator)
        draw_experts(self.w_out_EHD, self.out_scale * self.w_out_EHD.shape[2] ** -0.5, generator)

    def queries(self, x_RD: Tensor, load_E: Tensor) -> Tensor:
        """Return the queries of each row, rows sorted by expert."""
        return self.through(lambda x, load: grouped_matmul(x, local(self.w_query_EDH), load), x_RD, load_E)

    def outputs(self, mixed_RH: Tensor, load_E: Tensor) -> Tensor:
        """Return y_RD from what the heads have read, rows sorted by expert."""
        return self.through(lambda x, load: grouped_matmul(x, local(self.w_out_EHD), load), mixed_RH, load_E)

    def elements_per_row(self) -> int:
        """Numbers that a row for another process carries, there and back, twice: for its queries and its output."""
        return 2 * (self.w_query_EDH.shape[1] + self.w_query_EDH.shape[2])

    def flops_per_row_E(self) -> tuple[int, ...]:
        """Forward FLOPs of one row through each expert's projections; attention itself depends on the length."""
        return (2 * (self.w_query_EDH.numel() + self.w_out_EHD.numel()) // self.num_experts,) * self.num_experts

    def flops_per_token(self, rows_per_token: float, length: int) -> int:
        """Return the forward FLOPs of one token: projections, and attention by the heads that it uses."""
        width = math.ceil(rows_per_token) * self.w_query_EDH.shape[2]
        return super().flops_per_token(rows_per_token, length) + score_flops(length, width)

    def executed_flops(self, record: LayerRecord) -> Tensor:
        """Return the forward FLOPs for a record; attention runs for the largest number of heads of any token."""
        kept = record.kept
        assert isinstance(kept, Routing)
        has_holes = kept.kept_N is not None or kept.top_k is None
        num_slots = kept.experts_per_token_T.max().clamp(min=1) if has_holes else kept.top_k or 0
        attention = score_flops(record.sequence_length or 0, self.w_query_EDH.shape[2])
        return super().executed_flops(record) + num_slots * record.num_positions * attention


def score_flops(length: int, width: int) -> int:
    """Forward FLOPs of one token: its query times `length` keys, its weights times as many values."""
    return 4 * length * width
