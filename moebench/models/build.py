"""Build the backbone of a cell from its configuration."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from moebench.experts.assembly import RouterPlan, build_moe_layer, feed_forward_builder
from moebench.experts.feed_forward import NetworkStyle
from moebench.experts.kernels.grouped_mm import ROW_BYTES
from moebench.experts.layout import BlockPlan, Experts
from moebench.experts.projection import HeadBank, ProjectionBank
from moebench.experts.widths import Widths, solve_widths
from moebench.models.attention import Attention, AttentionStyle, CrossAttention
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.models.plan import Half, plan_backbone
from moebench.models.storageless import build_without_storage
from moebench.models.transformer import Block, StreamStyle, Transformer
from moebench.models.whole_model import StackBank, WholeModels
from moebench.routing.context import NO_DATA, DataSummary
from moebench.routing.features.feature import Feature
from moebench.routing.layer_name import LayerName
from moebench.routing.router import Router, RouterBuildContext, required_features
from moebench.schema import CellConfig

NO_FEATURES: Mapping[type[Feature], Any] = MappingProxyType({})
"""Where no feature has a build-time value."""


def build_backbone(
    config: CellConfig,
    *,
    causal: bool,
    data: DataSummary = NO_DATA,
    features: Mapping[type[Feature], Any] = NO_FEATURES,
    half: Half | None = None,
    sized_as: CellConfig | None = None,
) -> Transformer:
    """Build the transformer with the layout's banks of experts and their routers; weights are not initialised.

    `data.sequence_length`: length for which arms are matched, where experts change the cost of attention; None leaves
    attention scores out. `features`: build-time values. `half`: the backbone is one of two; `layout.experts_in` decides
    whether it has experts, and a decoder's blocks have cross-attention. `sized_as`: cell whose expert widths are used;
    None: this one.
    """
    context = RouterBuildContext(
        d_model=config.model.d_model,
        num_experts=1,
        data=data,
        features=features,
        width_ratio=config.model.d_model / (config.train.mup_base_width or config.model.d_model),
    )
    builder = Builder(
        config=config, causal=causal, context=context, sequence_length=data.sequence_length or 0, half=half
    )
    sizes = replace(builder, config=sized_as or config)
    widths = [sizes.widths(index, plan) for index, plan in enumerate(plan_backbone(sizes.config, half))]
    blocks = [builder.block(index, plan, widths[index]) for index, plan in enumerate(plan_backbone(config, half))]
    dropout_name = "input" if half is None else f"{half}.input"
    return Transformer(StreamStyle.of(config.model), blocks, required_features(config.router), dropout_name)


@dataclass(frozen=True, kw_only=True)
class Builder:
    """Builds the blocks of one backbone from the entries of a plan."""

    config: CellConfig
    causal: bool
    context: RouterBuildContext
    sequence_length: int
    half: Half | None = None

    @property
    def out_scale(self) -> float:
        """Scale of output matrices that keeps the residual stream near unit variance over all additions to it."""
        additions = 3 if self.half == "decoder" else 2
        return float((additions * self.config.model.num_layers) ** -0.5)

    def layer(self, index: int, part: Literal["feed_forward", "attention"] = "feed_forward") -> LayerName:
        """Return the name of a block's experts in records."""
        return LayerName(index, self.half, part)

    @property
    def dense_style(self) -> NetworkStyle:
        """Style of dense feed-forward networks."""
        model = self.config.model
        return NetworkStyle(
            d_model=model.d_model, activation=model.activation, out_scale=self.out_scale, bias=model.ffn_bias
        )

    @property
    def expert_style(self) -> NetworkStyle:
        """Style of routed and shared experts."""
        return replace(
            self.dense_style, activation=self.config.layout.expert_activation or self.config.model.activation
        )

    @property
    def attention_style(self) -> AttentionStyle:
        """Style of attention."""
        return AttentionStyle.of(self.config.model, self.out_scale)

    def block(self, index: int, plan: BlockPlan, widths: Widths) -> nn.Module:
        """Build one entry of a plan."""
        if not plan.banks:
            return self.dense_block(self.config.model.ffn_width, index)
        return self._for_widths(index, plan)(widths)

    def _for_widths(self, index: int, plan: BlockPlan) -> Callable[[Widths], nn.Module]:
        return self._stacks(plan.stack) if plan.stack else self._with_experts(index, plan)

    def dense_block(self, ffn_width: int, index: int = 0) -> Block:
        """Build a block without experts."""
        return self._assemble(index, self._attention(), self.dense_style.build(ffn_width), self._cross_attention())

    def _assemble(self, index: int, *parts: Any) -> Block:
        return Block(StreamStyle.of(self.config.model), str(self.layer(index)), *parts)

    def _cross_attention(self) -> CrossAttention | None:
        return CrossAttention(self.attention_style) if self.half == "decoder" else None

    def _attention(self) -> Attention:
        return Attention(self.attention_style, causal=self.causal)

    def _router(self, experts: Experts, index: int) -> tuple[RouterPlan, Router]:
        routed = RouterPlan.of(self.config.router, experts)
        above = self.config.model.num_layers if self.half == "decoder" else 0
        return routed, routed.build(replace(self.context, layer=above + index))

    def _with_experts(self, index: int, plan: BlockPlan) -> Callable[[Widths], nn.Module]:
        """Return a function from widths to the block; routers and attention are shared by all widths."""
        attention = self._expert_attention(index, plan.attention) if plan.attention else self._attention()
        cross_attention = self._cross_attention()
        if plan.feed_forward is None:
            style = self.dense_style
            return lambda widths: self._assemble(index, attention, style.build(widths.of(1.0)), cross_attention)
        routed, router = self._router(plan.feed_forward, index)
        experts = feed_forward_builder(
            routed, router, self.expert_style, layout=self.config.layout, name=self.layer(index)
        )
        return lambda widths: self._assemble(index, attention, experts(widths), cross_attention)

    def _expert_attention(self, index: int, experts: Experts) -> ProjectionExperts | HeadExperts:
        style = self.attention_style
        routed, router = self._router(experts, index)
        layer = partial(build_moe_layer, routed, router, layout=self.config.layout, name=self.layer(index, "attention"))
        number, kind = len(experts.shapes), experts.shapes[0].kind
        if kind != "head":
            num_kv_maps = 2 if kind == "projection" else 1
            out_width = style.d_model + num_kv_maps * style.kv_width
            bank = ProjectionBank(style.d_model, out_width, number, has_bias=style.has_qkv_bias)
            return ProjectionExperts(layer(bank), style, causal=self.causal)
        # As many heads in use as dense attention has, where they divide evenly.
        heads = max(style.num_heads // routed.experts_per_token, 1)
        heads_bank = HeadBank(style.d_model, heads * style.head_width, number, self.out_scale, bias=style.bias)
        return HeadExperts(layer(heads_bank), style, causal=self.causal)

    def _stacks(self, experts: Experts) -> Callable[[Widths], nn.Module]:
        model = self.config.model
        routed, router = self._router(experts, 0)
        stream, style = StreamStyle.of(model), self.expert_style

        def block(expert: int, index: int, widths: Widths) -> Block:
            dropout_name = f"expert {expert}.{index}"
            return Block(stream, dropout_name, self._attention(), style.build(widths.of(1.0)))

        def build(widths: Widths) -> WholeModels:
            stacks = [
                [block(expert, index, widths) for index in range(model.num_layers)]
                for expert in range(len(experts.shapes))
            ]
            layer = build_moe_layer(routed, router, StackBank(stacks), layout=self.config.layout, name=LayerName())
            return WholeModels(layer, model.d_model, model.num_layers)

        return build

    def _find_fixed_unit(self, plan: BlockPlan) -> int | None:
        """Return the width that the configuration sets, or None where it must be solved for."""
        layout, ffn_width = self.config.layout, self.config.model.ffn_width
        if plan.feed_forward and plan.feed_forward.unit:
            return plan.feed_forward.unit
        if layout.expert_width is None:
            return ffn_width if layout.match == "none" else None
        # With experts in attention the feed-forward part can be dense, to which the width of experts does not apply.
        return int(layout.expert_width) if plan.feed_forward or plan.stack else ffn_width

    def widths(self, index: int, plan: BlockPlan) -> Widths:
        """Return the widths of the experts of one entry of a plan, as the layout's `match` demands."""
        fixed = self._find_fixed_unit(plan)
        if fixed is not None or not plan.banks:
            return Widths(fixed or self.config.model.ffn_width)
        build = self._for_widths(index, plan)
        num_blocks = self.config.model.num_layers if plan.stack else 1
        layout, ffn_width = self.config.layout, self.config.model.ffn_width
        share = layout.total_params if layout.match == "params" else 1.0

        def cost(widths: Widths) -> float:
            with build_without_storage():
                return self._cost(build(widths))

        def target(width: int) -> float:
            with build_without_storage():
                return share * num_blocks * self._cost(self.dense_block(width))

        remedy = "layout.match=none" if plan.feed_forward is None and not plan.stack else "layout.expert_width"
        top_k = max(RouterPlan.of(self.config.router, experts).experts_per_token for experts in plan.banks)
        label = f"{top_k} experts per token and their router" + (f" in block {index}" if plan.attention else "")
        step = ROW_BYTES // (2 if self.config.train.precision == "bf16" else 4)
        return solve_widths(cost, target, ffn_width, step=step, what=label, remedy=remedy)

    def _cost(self, block: nn.Module) -> float:
        if self.config.layout.match == "params":
            return sum(parameter.numel() for parameter in block.parameters())
        assert isinstance(block, Block | WholeModels)
        return block.flops_per_token(self.sequence_length)
