"""From a cell's configuration to its backbone: the place where names and plans become modules."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from moebench.errors import UsageError, unknown
from moebench.experts.assembly import Routed, feed_forward_experts, moe_layer
from moebench.experts.feed_forward import FeedForward
from moebench.experts.grouped import ROW_BYTES
from moebench.experts.layout import LAYOUTS, BlockPlan, Experts
from moebench.experts.projection import HeadBank, ProjectionBank
from moebench.experts.widths import Widths, matched_widths
from moebench.models.attention import Attention, CrossAttention
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.models.transformer import Block, Transformer
from moebench.models.whole_model import StackBank, WholeModels
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS, Router, Site
from moebench.schema import CellConfig

Half = Literal["encoder", "decoder"]
"""Which backbone of a model that has two."""


def plan_of(config: CellConfig) -> tuple[BlockPlan, ...]:
    """Return what each block is; all dense for a dense router.

    Raises UsageError when layout, router and their options do not fit each other, or a loss is unknown.
    """
    plan: tuple[BlockPlan, ...] = LAYOUTS.get(config.layout.name).item.plan(config.layout, config.model.num_layers)
    total, match = config.layout.total_params, config.layout.match
    if total != 1.0 and match != "params":
        raise UsageError(f"layout.total_params={total:g} needs layout.match=params, got {match}")
    _check_kinds(config, plan)
    for block in plan:
        for experts in block.banks:
            Routed.of(config.router, experts)
    entry = ROUTERS.get(config.router.name, where="router.name")
    known = {*LOSSES.names(), *entry.facts.own_losses}
    for loss, coefficient in config.router.losses.items():
        if loss not in known:
            raise unknown("router.losses", loss, known)
        if not coefficient >= 0:
            raise UsageError(f"router.losses.{loss} must be at least 0, got {coefficient}")
    return (BlockPlan(),) * config.model.num_layers if entry.item.is_dense else plan


def _check_kinds(config: CellConfig, plan: tuple[BlockPlan, ...]) -> None:
    """Refuse what experts that are not feed-forward networks behind one router cannot do."""
    router, layout = ROUTERS.get(config.router.name, where="router.name").item, config.layout
    if router.is_dense:
        return
    special = any(block.attention or block.stack for block in plan)
    banks = [bank for block in plan for bank in block.banks]
    if router.merges and (special or any(bank.groups > 1 or not bank.can_merge for bank in banks)):
        raise UsageError(
            f"router.name: '{config.router.name}' sums the parameters of experts, and those of layout '{layout.name}'"
            " are not feed-forward networks of one shape in one group (allowed: another router or another layout)"
        )
    if router.is_soft and (special or any(bank.groups > 1 for bank in banks)):
        raise UsageError(
            f"router.name: '{config.router.name}' mixes tokens into slots, and layout '{layout.name}' needs to know"
            " where each token goes (allowed: another router, or a layout of feed-forward experts in one group)"
        )
    if router.is_chain:
        _check_chain(config, plan)
    if special and layout.overflow == "pass":
        raise UsageError(f"layout.overflow: 'pass' has no meaning in layout '{layout.name}' (allowed: drop, reroute)")
    if special and layout.expert_dropout > 0:
        raise UsageError(f"layout.expert_dropout must be 0 in layout '{layout.name}', got {layout.expert_dropout:g}")


def _check_chain(config: CellConfig, plan: tuple[BlockPlan, ...]) -> None:
    """Refuse a chain of experts where they cannot stand one behind another, or where one could be left out."""
    name, layout = config.router.name, config.layout
    if any(block.attention or block.stack or bank.groups > 1 for block in plan for bank in block.banks):
        raise UsageError(
            f"router.name: '{name}' sends tokens through one expert after another, and in layout '{layout.name}' they"
            " stand side by side (allowed: another router, or a layout of feed-forward experts in one group)"
        )
    for key in ("capacity_factor_train", "capacity_factor_eval"):
        factor = getattr(layout, key)
        if factor is not None and not math.isinf(factor):
            raise UsageError(f"layout.{key} must be null with router '{name}', got {factor:g}: no step can be left out")


def build_backbone(
    config: CellConfig,
    *,
    causal: bool,
    vocab_size: int | None = None,
    token_count_V: Tensor | None = None,
    token_pairs: Callable[[], Tensor] | None = None,
    sequence_length: int | None = None,
    num_domains: int | None = None,
    half: Half | None = None,
    sized_as: CellConfig | None = None,
) -> Transformer:
    """Build the transformer with the layout's banks of experts behind their routers; weights are not drawn yet.

    `sequence_length`: for which arms are matched; it matters where experts change the cost of attention itself. None
    leaves the scores of attention out. `half`: the backbone is one of two; `layout.experts_in` says whether it has
    experts, and a decoder's blocks have cross-attention. `sized_as`: whose widths the experts have; None: those solved
    for this one.
    """
    site = Site(
        d_model=config.model.d_model,
        num_experts=1,
        vocab_size=vocab_size,
        token_count_V=token_count_V,
        token_pairs=token_pairs,
        sequence_length=sequence_length,
        num_domains=num_domains,
        embedding_width=ROUTERS.get(config.router.name).item.embedding(config.router)[0],
    )
    builder = Builder(config=config, causal=causal, site=site, sequence_length=sequence_length or 0, half=half)
    sizes = replace(builder, config=sized_as or config)
    widths = [sizes.widths(index, plan) for index, plan in enumerate(_plan_of_half(sizes.config, half))]
    blocks = [builder.block(index, plan, widths[index]) for index, plan in enumerate(_plan_of_half(config, half))]
    return Transformer(config.model.d_model, blocks)


def _plan_of_half(config: CellConfig, half: Half | None) -> tuple[BlockPlan, ...]:
    plans = plan_of(config)
    with_experts = half is None or config.layout.experts_in in ("both", half)
    return plans if with_experts else (BlockPlan(),) * len(plans)


@dataclass(frozen=True, kw_only=True)
class Builder:
    """What all blocks of a model have around them."""

    config: CellConfig
    causal: bool
    site: Site
    sequence_length: int
    half: Half | None = None

    @property
    def out_scale(self) -> float:
        """Keeps the residual stream near unit variance, with two additions per block, or three in a decoder."""
        additions = 3 if self.half == "decoder" else 2
        return float((additions * self.config.model.num_layers) ** -0.5)

    def layer(self, index: int) -> int | str:
        """Return the name of a block's experts in records."""
        return index if self.half is None else f"{self.half}.{index}"

    @property
    def activation(self) -> str:
        """Of routed and shared experts."""
        return str(self.config.layout.expert_activation or self.config.model.activation)

    def block(self, index: int, plan: BlockPlan, widths: Widths) -> nn.Module:
        """Build one entry of a plan."""
        if not plan.banks:
            return self.dense_block(self.config.model.ffn_width)
        return self._for_widths(index, plan)(widths)

    def _for_widths(self, index: int, plan: BlockPlan) -> Callable[[Widths], nn.Module]:
        return self._stacks(plan.stack) if plan.stack else self._with_experts(index, plan)

    def dense_block(self, ffn_width: int) -> Block:
        """Build a block without experts."""
        sizes = self.config.model
        dense = FeedForward(sizes.d_model, ffn_width, sizes.activation, self.out_scale)
        return Block(sizes.d_model, self._attention(), dense, self._cross_attention())

    def _cross_attention(self) -> CrossAttention | None:
        sizes = self.config.model
        if self.half != "decoder":
            return None
        return CrossAttention(sizes.d_model, sizes.num_heads, out_scale=self.out_scale)

    def _attention(self) -> Attention:
        sizes = self.config.model
        return Attention(
            sizes.d_model,
            sizes.num_heads,
            causal=self.causal,
            rope_theta=sizes.rope_theta,
            out_scale=self.out_scale,
        )

    def _router(self, experts: Experts, index: int) -> tuple[Routed, Router]:
        routed = Routed.of(self.config.router, experts)
        above = self.config.model.num_layers if self.half == "decoder" else 0
        return routed, routed.build(replace(self.site, layer=above + index))

    def _with_experts(self, index: int, plan: BlockPlan) -> Callable[[Widths], nn.Module]:
        """Return what builds the block for given widths: the routers and the attention are the same for all."""
        sizes = self.config.model
        attention = self._expert_attention(index, plan.attention) if plan.attention else self._attention()
        across = self._cross_attention()
        if plan.feed_forward is None:
            return lambda widths: Block(
                sizes.d_model,
                attention,
                FeedForward(sizes.d_model, widths.of(1.0), sizes.activation, self.out_scale),
                across,
            )
        routed, router = self._router(plan.feed_forward, index)
        experts = feed_forward_experts(
            routed,
            router,
            d_model=sizes.d_model,
            activation=self.activation,
            out_scale=self.out_scale,
            layout=self.config.layout,
            layer=self.layer(index),
        )
        return lambda widths: Block(sizes.d_model, attention, experts(widths), across)

    def _expert_attention(self, index: int, experts: Experts) -> ProjectionExperts | HeadExperts:
        sizes = self.config.model
        routed, router = self._router(experts, index)
        layer = partial(moe_layer, routed, router, layout=self.config.layout, layer=f"{self.layer(index)}.attention")
        number, kind = len(experts.shapes), experts.shapes[0].kind
        if kind != "head":
            num_maps = 3 if kind == "projection" else 2
            bank = ProjectionBank(sizes.d_model, num_maps * sizes.d_model, number)
            return ProjectionExperts(
                layer(bank),
                sizes.d_model,
                sizes.num_heads,
                causal=self.causal,
                rope_theta=sizes.rope_theta,
                out_scale=self.out_scale,
            )
        # As many heads in use as dense attention has, where they can be dealt out evenly.
        heads = max(sizes.num_heads // routed.experts_per_token, 1)
        head_width = sizes.d_model // sizes.num_heads
        heads_bank = HeadBank(sizes.d_model, heads * head_width, number, self.out_scale)
        return HeadExperts(
            layer(heads_bank), sizes.d_model, heads, head_width, causal=self.causal, rope_theta=sizes.rope_theta
        )

    def _stacks(self, experts: Experts) -> Callable[[Widths], nn.Module]:
        sizes = self.config.model
        routed, router = self._router(experts, 0)

        def block(widths: Widths) -> Block:
            network = FeedForward(sizes.d_model, widths.of(1.0), self.activation, self.out_scale)
            return Block(sizes.d_model, self._attention(), network)

        def build(widths: Widths) -> WholeModels:
            stacks = [[block(widths) for _ in range(sizes.num_layers)] for _ in experts.shapes]
            layer = moe_layer(routed, router, StackBank(stacks), layout=self.config.layout, layer=0)
            return WholeModels(layer, sizes.d_model, sizes.num_layers)

        return build

    def _fixed_unit(self, plan: BlockPlan) -> int | None:
        """Return the width that the configuration names, or None when it is to be solved."""
        layout, ffn_width = self.config.layout, self.config.model.ffn_width
        if plan.feed_forward and plan.feed_forward.unit:
            return plan.feed_forward.unit
        if layout.expert_width is None:
            return ffn_width if layout.match == "none" else None
        # Beside experts in attention the feed-forward part can be dense: the width of an expert is not its.
        return int(layout.expert_width) if plan.feed_forward or plan.stack else ffn_width

    def widths(self, index: int, plan: BlockPlan) -> Widths:
        """Return how wide the experts of one entry of a plan are, as the layout's `match` says."""
        fixed = self._fixed_unit(plan)
        if fixed is not None or not plan.banks:
            return Widths(fixed or self.config.model.ffn_width)
        build = self._for_widths(index, plan)
        num_blocks = self.config.model.num_layers if plan.stack else 1
        layout, ffn_width = self.config.layout, self.config.model.ffn_width
        share = layout.total_params if layout.match == "params" else 1.0

        def cost(widths: Widths) -> float:
            with torch.device("meta"):
                return self._cost(build(widths))

        def target(width: int) -> float:
            with torch.device("meta"):
                return share * num_blocks * self._cost(self.dense_block(width))

        remedy = "layout.match=none" if plan.feed_forward is None and not plan.stack else "layout.expert_width"
        top_k = max(Routed.of(self.config.router, experts).experts_per_token for experts in plan.banks)
        what = f"{top_k} experts per token and their router" + (f" in block {index}" if plan.attention else "")
        step = ROW_BYTES // (2 if self.config.train.precision == "bf16" else 4)
        return matched_widths(cost, target, ffn_width, step=step, what=what, remedy=remedy)

    def _cost(self, block: nn.Module) -> float:
        if self.config.layout.match == "params":
            return sum(parameter.numel() for parameter in block.parameters())
        assert isinstance(block, Block | WholeModels)
        return block.flops_per_token(self.sequence_length)
