"""Attention with experts as its projections or as its heads."""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.layer import MoELayer
from moebench.experts.projection import HeadBank, ProjectionBank, attention_score_flops
from moebench.models.attention import PositionTable, attend, split_heads
from moebench.routing.context import RouteContext
from moebench.routing.linear_map import INPUT_FIRST, OUTPUT_FIRST, LinearMap
from moebench.routing.values import LayerRecord, Routing


class ProjectionExperts(nn.Module):
    """Attention whose queries, keys and values come from experts: one choice of experts for each token.

    The experts are linear (Switch, arXiv:2101.03961, appendix A): three maps each, or two, whose keys are the values
    too. The output projection is dense.
    """

    def __init__(
        self, layer: MoELayer, d_model: int, num_heads: int, *, causal: bool, rope_theta: float, out_scale: float
    ) -> None:
        super().__init__()
        assert isinstance(layer.bank, ProjectionBank)
        self.layer = layer
        self.num_heads = num_heads
        self.causal = causal
        self.rope_theta = rope_theta
        self.out_scale = out_scale
        self.out = nn.Linear(d_model, d_model, bias=False)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the output projection with the values of dense attention, which draws its other one first."""
        nn.init.normal_(torch.empty(3 * self.out.in_features, self.out.in_features), generator=generator)
        nn.init.normal_(self.out.weight, std=self.out_scale * self.out.in_features**-0.5, generator=generator)

    def forward(
        self, x_BLD: Tensor, ctx: RouteContext, positions: PositionTable | None = None
    ) -> tuple[Tensor, LayerRecord]:
        """Return the attention output, without the residual, and the record."""
        qkv_TO, record = self.layer(x_BLD.flatten(0, 1), ctx)
        width = x_BLD.shape[-1]
        if qkv_TO.shape[-1] == 2 * width:
            qkv_TO = torch.cat([qkv_TO, qkv_TO[:, width:]], dim=-1)
        query, key, value = split_heads(qkv_TO.unflatten(0, x_BLD.shape[:2]), self.num_heads)
        attended_BLD = attend(query, key, value, causal=self.causal, rope_theta=self.rope_theta, positions=positions)
        out: Tensor = self.out(attended_BLD)
        return out, record

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where queries, keys and values are in the projection of each expert."""
        d_model, out_width = self.layer.bank.get_parameter("weight_EDO").shape[1:]
        return {"layer.bank.weight_EDO": replace(INPUT_FIRST, out_parts=(d_model,) * (out_width // d_model))}

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`."""
        width = self.out.in_features
        return self.layer.flops_per_token() + 2 * self.out.weight.numel() + attention_score_flops(length, width)


class HeadExperts(nn.Module):
    """Attention whose heads are experts: the router picks a token's heads; all experts share keys and values.

    Mixture of attention heads (arXiv:2210.05144): y = Σ_i w_i softmax(x W_q,i K^T) V W_o,i.
    """

    def __init__(
        self, layer: MoELayer, d_model: int, heads_per_expert: int, head_width: int, *, causal: bool, rope_theta: float
    ) -> None:
        super().__init__()
        self.layer = layer
        self.heads_per_expert = heads_per_expert
        self.head_width = head_width
        self.causal = causal
        self.rope_theta = rope_theta
        self.key_value = nn.Linear(d_model, 2 * heads_per_expert * head_width, bias=False)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the keys and values as dense attention does."""
        nn.init.normal_(self.key_value.weight, std=self.key_value.in_features**-0.5, generator=generator)

    def forward(
        self, x_BLD: Tensor, ctx: RouteContext, positions: PositionTable | None = None
    ) -> tuple[Tensor, LayerRecord]:
        """Return the attention output, without the residual, and the record."""
        x_TD = x_BLD.flatten(0, 1)
        record = self.layer.route(x_TD, ctx)
        assert isinstance(record.kept, Routing)  # soft routers are refused where the plan is made
        kept = record.kept.compact()
        plan = DispatchPlan.of(kept)
        load_E = plan.groups.load_E
        query_RH = self.bank.queries(dispatch(x_TD, plan), load_E)
        slot_R = _slots_of_assignments(kept)[plan.assignment_R]
        num_slots = kept.top_k or int(kept.experts_per_token_T.max()) or 1
        mixed_TKH = self._attend(
            x_BLD, _scatter_queries(query_RH, plan.token_R, slot_R, kept.num_tokens, num_slots), positions
        )
        y_RD = self.bank.outputs(mixed_TKH[plan.token_R, slot_R], load_E)
        return combine(y_RD, kept.weight_N, plan).view_as(x_BLD), record

    @property
    def bank(self) -> HeadBank:
        """The experts."""
        assert isinstance(self.layer.bank, HeadBank)
        return self.layer.bank

    def _attend(self, x_BLD: Tensor, query_TKH: Tensor, positions: PositionTable | None) -> Tensor:
        """Let every query of a token attend to its sequence; a slot without an expert has a query of 0."""
        batch, length, _ = x_BLD.shape
        slots, heads = query_TKH.shape[1], self.heads_per_expert
        key_value = self.key_value(x_BLD).view(batch, length, 2, 1, heads, self.head_width)
        key_value = key_value.expand(-1, -1, -1, slots, -1, -1).flatten(3, 4)
        key, value = key_value.transpose(1, 3).unbind(2)
        query = query_TKH.view(batch, length, slots * heads, self.head_width).transpose(1, 2)
        mixed = attend(query, key, value, causal=self.causal, rope_theta=self.rope_theta, positions=positions)
        return mixed.reshape(batch * length, slots, heads * self.head_width)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where keys and values are in their common projection."""
        return {"key_value.weight": replace(OUTPUT_FIRST, out_parts=(self.key_value.out_features // 2,) * 2)}

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`."""
        return self.layer.flops_per_token(length) + 2 * self.key_value.weight.numel()


def _slots_of_assignments(routing: Routing) -> Tensor:
    """Return each assignment's position among those of its token, from 0."""
    order_N = routing.token_N.argsort(stable=True)
    count_T = routing.experts_per_token_T
    start_T = count_T.cumsum(0) - count_T
    slot_N = torch.arange(order_N.numel(), device=order_N.device) - start_T[routing.token_N[order_N]]
    return torch.empty_like(slot_N).scatter_(0, order_N, slot_N)


def _scatter_queries(query_RH: Tensor, token_R: Tensor, slot_R: Tensor, num_tokens: int, num_slots: int) -> Tensor:
    zeros_TKH = query_RH.new_zeros(num_tokens, num_slots, query_RH.shape[-1])
    return zeros_TKH.index_put((token_R, slot_R), query_RH)
