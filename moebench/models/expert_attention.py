"""Attention with experts as its projections or as its heads."""

from dataclasses import replace

import torch
from torch import Generator, Tensor, nn

from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.layer import MoELayer
from moebench.experts.projection import HeadBank, ProjectionBank, attention_score_flops
from moebench.models.attention import AttentionStyle, Heads, init_linear
from moebench.models.dropout import SequenceDropout
from moebench.models.positions import PositionTable
from moebench.routing.context import RouteContext
from moebench.routing.linear_map import INPUT_FIRST, OUTPUT_FIRST, LinearMap
from moebench.routing.values import LayerRecord, Routing


class ProjectionExperts(nn.Module):
    """Attention whose queries, keys and values come from experts: one choice of experts for each token.

    The experts are linear (Switch, arXiv:2101.03961, appendix A): three maps each, or two, whose keys are the values
    too. The output projection is dense.
    """

    def __init__(self, layer: MoELayer, style: AttentionStyle, *, causal: bool) -> None:
        super().__init__()
        assert isinstance(layer.bank, ProjectionBank)
        self.layer = layer
        self.style = style
        self.causal = causal
        self.out = nn.Linear(style.d_model, style.d_model, bias=style.has_out_bias)
        self.qk_norm = style.build_qk_norm(style.d_model, style.kv_width)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the output projection with the values of dense attention, which draws its other one first."""
        width, kv_width = self.out.in_features, self.style.kv_width
        nn.init.normal_(torch.empty(width + 2 * kv_width, width), generator=generator)
        init_linear(self.out, generator, scale=self.style.out_scale)

    def forward(
        self,
        x_BLD: Tensor,
        ctx: RouteContext,
        positions: PositionTable | None = None,
        dropout: SequenceDropout | None = None,
    ) -> tuple[Tensor, LayerRecord]:
        """Return the attention output, without the residual, and the record; `dropout`: of the weights."""
        qkv_TO, record = self.layer(x_BLD.flatten(0, 1), ctx)
        heads = Heads.split(qkv_TO.unflatten(0, x_BLD.shape[:2]), self.style, self.qk_norm)
        attended_BLD = heads.attend(self.style.rotary, causal=self.causal, positions=positions, dropout=dropout)
        out: Tensor = self.out(attended_BLD)
        return out, record

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where queries, keys and values are in the projection of each expert."""
        d_model, kv_width = self.style.d_model, self.style.kv_width
        num_kv_maps = (self.layer.bank.get_parameter("weight_EDO").shape[2] - d_model) // kv_width
        parts = (d_model, *[kv_width] * num_kv_maps)
        return {"layer.bank.weight_EDO": replace(INPUT_FIRST, out_parts=parts)}

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`."""
        width = self.out.in_features
        return self.layer.flops_per_token() + 2 * self.out.weight.numel() + attention_score_flops(length, width)


class HeadExperts(nn.Module):
    """Attention whose heads are experts: the router picks a token's heads; all experts share keys and values.

    Mixture of attention heads (arXiv:2210.05144): y = Σ_i w_i softmax(x W_q,i K^T) V W_o,i.
    """

    def __init__(self, layer: MoELayer, style: AttentionStyle, *, causal: bool) -> None:
        super().__init__()
        assert isinstance(layer.bank, HeadBank)
        self.layer = layer
        self.style = style
        self.causal = causal
        self.heads_per_expert = layer.bank.w_query_EDH.shape[2] // style.head_width
        self.kv_heads = count_shared_kv_heads(self.heads_per_expert, style)
        kv_width = self.kv_heads * style.head_width
        self.key_value = nn.Linear(style.d_model, 2 * kv_width, bias=style.has_qkv_bias)
        self.qk_norm = style.build_qk_norm(self.heads_per_expert * style.head_width, kv_width)

    def init_weights(self, generator: Generator) -> None:
        """Initialise the keys and values as dense attention does."""
        init_linear(self.key_value, generator)

    def forward(
        self,
        x_BLD: Tensor,
        ctx: RouteContext,
        positions: PositionTable | None = None,
        dropout: SequenceDropout | None = None,
    ) -> tuple[Tensor, LayerRecord]:
        """Return the attention output, without the residual, and the record; `dropout`: of the weights."""
        x_TD = x_BLD.flatten(0, 1)
        record = self.layer.route(x_TD, ctx)
        assert isinstance(record.kept, Routing)  # soft routers are refused where the plan is made
        kept = record.kept.compact()
        plan = DispatchPlan.of(kept)
        load_E = plan.groups.load_E
        query_RH = self.bank.queries(dispatch(x_TD, plan), load_E)
        slot_R = _slots_of_assignments(kept)[plan.assignment_R]
        num_slots = kept.top_k or max([1, *kept.experts_per_token_T.tolist()])
        query_TKH = _scatter_queries(query_RH, plan.token_R, slot_R, kept.num_tokens, num_slots)
        mixed_TKH = self._attend(x_BLD, query_TKH, positions, dropout)
        y_RD = self.bank.outputs(mixed_TKH[plan.token_R, slot_R], load_E)
        return combine(y_RD, kept.weight_N, plan).view_as(x_BLD), record

    @property
    def bank(self) -> HeadBank:
        """The experts."""
        assert isinstance(self.layer.bank, HeadBank)
        return self.layer.bank

    def _attend(
        self, x_BLD: Tensor, query_TKH: Tensor, positions: PositionTable | None, dropout: SequenceDropout | None
    ) -> Tensor:
        """Let every query of a token attend to its sequence; a slot without an expert has a query of 0."""
        batch, length, _ = x_BLD.shape
        slots, width = query_TKH.shape[1:]
        query_BLKH = query_TKH.view(batch, length, slots, width)
        key_BLX, value_BLX = self.key_value(x_BLD).chunk(2, dim=-1)
        if self.qk_norm is not None:
            query_BLKH, key_BLX = self.qk_norm(query_BLKH, key_BLX)
        key_BLX, value_BLX = (x_BLX.unsqueeze(2).expand(-1, -1, slots, -1).flatten(2) for x_BLX in (key_BLX, value_BLX))
        heads = Heads.of(query_BLKH.flatten(2), key_BLX, value_BLX, self.style.head_width, None)
        # The number of slots is that of this process alone.
        dropout = None if dropout is None else replace(dropout, num_slots=slots)
        mixed = heads.attend(self.style.rotary, causal=self.causal, positions=positions, dropout=dropout)
        return mixed.reshape(batch * length, slots, width)

    def linear_maps(self) -> dict[str, LinearMap]:
        """Return where keys and values are in their common projection."""
        return {"key_value.weight": replace(OUTPUT_FIRST, out_parts=(self.key_value.out_features // 2,) * 2)}

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`."""
        return self.layer.flops_per_token(length) + 2 * self.key_value.weight.numel()


def count_shared_kv_heads(heads_per_expert: int, style: AttentionStyle) -> int:
    """Return the heads of the keys and values that all experts share: as many query heads each as in dense attention.

    At least one, and a divisor of an expert's heads.
    """
    wanted = max(heads_per_expert * style.num_kv_heads // style.num_heads, 1)
    return max(number for number in range(1, wanted + 1) if heads_per_expert % number == 0)


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
