"""From a layout's plan to modules: the router of a bank, its experts, and the layer around them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from moebench.errors import UsageError
from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import FeedForward, NetworkStyle
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.layout import Experts, LayoutConfig
from moebench.experts.mixed import WITHOUT_NETWORK, build_bank
from moebench.experts.widths import Widths
from moebench.routing.composite import GroupedRouter
from moebench.routing.contract import build_router, label_router
from moebench.routing.features.feature import collect
from moebench.routing.layer_name import LayerName
from moebench.routing.router import ROUTERS, Router, RouterBuildContext


@dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """The router of a bank: its configuration, adjusted to the layout, and what follows from it."""

    router_class: type[Router]
    config: Any
    experts: Experts

    @classmethod
    def of(cls, config: Any, experts: Experts) -> "RouterPlan":
        """Fit a router's configuration to a bank; raise UsageError when they are not compatible."""
        router_class: type[Router] = ROUTERS.get(config.name, where="router.name").item
        if router_class.form.is_dense:
            return cls(router_class=router_class, config=config, experts=experts)
        num_experts = len(experts.shapes)
        scaled = scale_experts_per_token(router_class, config, experts.top_k_factor, num_experts)
        plan = cls(router_class=router_class, config=scaled, experts=experts)
        for name, size in plan._levels():
            try:
                router_class.check(scaled, size)
            except UsageError as error:
                raise UsageError(f"{error} ({name})" if name else str(error)) from error
        if plan.experts_per_token < 1:
            raise UsageError(f"{label_router(config.name)}: experts_per_token must be at least 1")
        return plan

    def _levels(self) -> list[tuple[str, int]]:
        """Return for each router of the bank a remark for errors and the number of its options."""
        size, groups = len(self.experts.shapes), self.experts.groups
        if self.experts.top_k_factor > 1:
            return [(f"here {size} experts, and experts per token times {self.experts.top_k_factor}", size)]
        if groups == 1:
            return [("", size)]
        inner = [(f"here {size // groups} experts in each of layout.groups={groups}", size // groups)]
        return [(f"here layout.groups={groups}", groups), *inner] if self.experts.pick_groups else inner

    @property
    def experts_per_token(self) -> int:
        """Experts that one token uses in all groups together."""
        experts, groups = len(self.experts.shapes), self.experts.groups
        inner = self.router_class.experts_per_token(self.config, experts // groups)
        if groups == 1:
            return inner
        return inner * (
            self.router_class.experts_per_token(self.config, groups) if self.experts.pick_groups else groups
        )

    def build(self, context: RouterBuildContext) -> Router:
        """Build the router, or one router that holds those of the groups."""
        context = replace(context, num_experts=len(self.experts.shapes))
        if self.experts.groups == 1:
            has_network_E = [shape.kind not in WITHOUT_NETWORK for shape in self.experts.shapes]
            required = self.router_class.required_features(self.config)
            values = collect(required, lambda feature: feature.from_bank(has_network_E))
            return build_router(
                self.router_class, self.config, replace(context, features={**context.features, **values})
            )
        pick = self.experts.pick_groups
        return GroupedRouter(self.router_class, self.config, context, self.experts.groups, pick_groups=pick)


def scale_experts_per_token(router_class: type[Router], config: Any, factor: int, num_experts: int) -> Any:
    """Return the router's configuration with `factor` times as many experts per token, of `num_experts`.

    Raises UsageError for a router whose number of experts per token is fixed.
    """
    takes_all = router_class.experts_per_token(config, num_experts) >= num_experts
    if factor == 1 or takes_all:
        return config
    for field in fields(config):
        if field.name in ("top_k", "average_experts"):
            return replace(config, **{field.name: factor * getattr(config, field.name)})
    k = router_class.experts_per_token(config, num_experts)
    raise UsageError(
        f"router.name: '{config.name}' is fixed at {k} experts per token, and layout.split={factor} asks for"
        f" {factor * k} (allowed: layout.split=1, or a router with top_k; {{name: top_k, top_k: 1, renormalise: false}}"
        " has switch's weights)"
    )


def build_moe_layer(
    plan: RouterPlan,
    router: Router,
    bank: Bank,
    *,
    layout: LayoutConfig,
    name: LayerName,
    shared: FeedForward | None = None,
) -> MoELayer:
    """Build the layer of a router and a bank."""
    options = LayerOptions(
        experts_per_token=plan.experts_per_token,
        capacity=Capacity.from_layout(layout),
        expert_dropout=layout.expert_dropout,
        residual=plan.experts.residual,
        name=name,
    )
    return MoELayer(router, bank, options, shared=shared)


def feed_forward_builder(
    plan: RouterPlan, router: Router, style: NetworkStyle, *, layout: LayoutConfig, name: LayerName
) -> Callable[[Widths], MoELayer]:
    """Return a function that builds the MoE layer of a block for given widths; all its layers share the router."""
    experts = plan.experts

    def build(widths: Widths) -> MoELayer:
        shared = None
        if experts.shared:
            shared = style.build(widths.of(experts.shared))
        bank = build_bank(experts.shapes, widths, style, recompute=layout.recompute)
        return build_moe_layer(plan, router, bank, layout=layout, name=name, shared=shared)

    return build
