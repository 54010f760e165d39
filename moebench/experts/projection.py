"""Banks for attention: experts that are projections, and experts that are attention heads."""

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.experts.activation import Dropout
from moebench.experts.bank import Bank, init_experts, local_shard, read_weight
from moebench.experts.biased import add_expert_bias, zero_biases
from moebench.experts.grouped import grouped_matmul
from moebench.routing.linear_map import INPUT_FIRST, LinearMap
from moebench.routing.values import LayerRecord, Routing


class ProjectionBank(Bank):
    """E matrices x_D -> y_O without an activation, so there is nothing for dropout."""

    def __init__(self, d_model: int, out_width: int, num_experts: int, *, has_bias: bool = False) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight_EDO = nn.Parameter(torch.empty(num_experts, d_model, out_width))
        self.b_out_EO = nn.Parameter(torch.empty(num_experts, out_width)) if has_bias else None

    @override
    def init_weights(self, generator: Generator) -> None:
        init_experts(self.weight_EDO, self.weight_EDO.shape[1] ** -0.5, generator)
        zero_biases(self.b_out_EO)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the projection is in the parameters."""
        return {"weight_EDO": INPUT_FIRST}

    @override
    def rows(self, x_RD: Tensor, load_E: Tensor, dropout: Dropout | None = None) -> Tensor:
        return _multiply(x_RD, self.weight_EDO, self.b_out_EO, load_E)

    @override
    def expert(self, x_RD: Tensor, index: int) -> Tensor:
        y_RO = x_RD @ self.weight_EDO[index]
        return y_RO if self.b_out_EO is None else y_RO + self.b_out_EO[index]

    @override
    def elements_per_row(self) -> int:
        return self.weight_EDO.shape[1] + self.weight_EDO.shape[2]

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (2 * self.weight_EDO.numel() // self.num_experts,) * self.num_experts


class HeadBank(Bank):
    """E experts that are attention heads: a query and an output projection each; keys and values are shared.

    The output of an expert depends on the sequence, so there is no `rows`: `queries` are computed before the attention,
    `outputs` after it (see `models.expert_attention`).
    """

    def __init__(
        self,
        d_model: int,
        head_width: int,
        num_experts: int,
        out_scale: float,
        *,
        bias: Literal["none", "qkv", "all"] = "none",
    ) -> None:
        """`head_width`: of all heads of one expert together; `bias`: of the queries, or of the output too."""
        super().__init__()
        self.num_experts = num_experts
        self.out_scale = out_scale
        self.w_query_EDH = nn.Parameter(torch.empty(num_experts, d_model, head_width))
        self.w_out_EHD = nn.Parameter(torch.empty(num_experts, head_width, d_model))
        self.b_query_EH = nn.Parameter(torch.empty(num_experts, head_width)) if bias != "none" else None
        self.b_out_ED = nn.Parameter(torch.empty(num_experts, d_model)) if bias == "all" else None

    @override
    def init_weights(self, generator: Generator) -> None:
        init_experts(self.w_query_EDH, self.w_query_EDH.shape[1] ** -0.5, generator)
        init_experts(self.w_out_EHD, self.out_scale * self.w_out_EHD.shape[2] ** -0.5, generator)
        zero_biases(self.b_query_EH, self.b_out_ED)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where the projections are in the parameters."""
        return {"w_query_EDH": INPUT_FIRST, "w_out_EHD": INPUT_FIRST}

    def queries(self, x_RD: Tensor, load_E: Tensor) -> Tensor:
        """Return the queries of each row, [R, H], rows sorted by expert."""
        return self._project(x_RD, self.w_query_EDH, self.b_query_EH, load_E)

    def outputs(self, mixed_RH: Tensor, load_E: Tensor) -> Tensor:
        """Return y_RD from the heads' attention outputs, rows sorted by expert."""
        return self._project(mixed_RH, self.w_out_EHD, self.b_out_ED, load_E)

    def _project(self, x_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, load_E: Tensor) -> Tensor:
        def compute(x_RI: Tensor, load_E: Tensor) -> Tensor:
            return _multiply(x_RI, weight_EIO, bias_EO, load_E)

        return self.compute_at_experts(compute, x_RI, load_E)

    @override
    def elements_per_row(self) -> int:
        return 2 * (self.w_query_EDH.shape[1] + self.w_query_EDH.shape[2])  # sent for the query and for the output

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return (2 * (self.w_query_EDH.numel() + self.w_out_EHD.numel()) // self.num_experts,) * self.num_experts

    @override
    def flops_per_token(self, rows_per_token: float, length: int) -> int:
        width = math.ceil(rows_per_token) * self.w_query_EDH.shape[2]
        return super().flops_per_token(rows_per_token, length) + attention_score_flops(length, width)

    @override
    def executed_flops(self, record: LayerRecord) -> Tensor:
        kept = record.kept
        assert isinstance(kept, Routing)
        has_holes = kept.kept_N is not None or kept.top_k is None
        # Attention runs for the largest number of heads of any token.
        num_slots = functional.pad(kept.experts_per_token_T, (0, 1), value=1).max() if has_holes else kept.top_k or 0
        attention = attention_score_flops(record.sequence_length or 0, self.w_query_EDH.shape[2])
        return super().executed_flops(record) + num_slots * record.num_positions * attention


def _multiply(x_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, load_E: Tensor) -> Tensor:
    """Return each row times the matrix of its expert, with its bias; rows sorted by expert, of this process's ones."""
    y_RO = grouped_matmul(x_RI, read_weight(weight_EIO), load_E)
    return y_RO if bias_EO is None else add_expert_bias(y_RO, local_shard(bias_EO), load_E)


def attention_score_flops(length: int, width: int) -> int:
    """Return the forward FLOPs of one token: its query times `length` keys, its weights times as many values."""
    return 4 * length * width
