"""From the values of a layout's plan to modules: the router of a bank, its experts, and the layer around them."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from moebench.errors import UsageError
from moebench.experts.bank import Bank
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.experts.layout import Experts, LayoutConfig
from moebench.experts.mixed import WITHOUT_NETWORK, bank_of
from moebench.experts.widths import Widths
from moebench.routing.composite import GroupedRouter
from moebench.routing.router import ROUTERS, Router, RouterBuildContext


@dataclass(frozen=True, kw_only=True)
class RouterPlan:
    """A router as a bank needs it: the configuration with the layout's wishes, and what follows from it."""

    router_class: type[Router]
    config: Any
    experts: Experts

    @classmethod
    def of(cls, config: Any, experts: Experts) -> "RouterPlan":
        """Fit a router's configuration to a bank; raise UsageError when they do not go together."""
        router_class: type[Router] = ROUTERS.get(config.name, where="router.name").item
        if router_class.form.is_dense:
            return cls(router_class=router_class, config=config, experts=experts)
        num_experts = len(experts.shapes)
        scaled = scale_experts_per_token(router_class, config, experts.top_k_factor, num_experts)
        routed = cls(router_class=router_class, config=scaled, experts=experts)
        for name, size in routed._levels():
            try:
                router_class.check(scaled, size)
            except UsageError as error:
                raise UsageError(f"{error} ({name})" if name else str(error)) from error
        return routed

    def _levels(self) -> list[tuple[str, int]]:
        """Return what each router of the bank chooses among: a remark for errors, and how many there are."""
        size, groups = len(self.experts.shapes), self.experts.groups
        if self.experts.top_k_factor > 1:
            return [(f"here {size} experts, and experts per token times {self.experts.top_k_factor}", size)]
        if groups == 1:
            return [("", size)]
        inner = [(f"here {size // groups} experts in each of layout.groups={groups}", size // groups)]
        return [(f"here layout.groups={groups}", groups), *inner] if self.experts.pick_groups else inner

    @property
    def experts_per_token(self) -> int:
        """Experts that one token uses: of all groups together."""
        experts, groups = len(self.experts.shapes), self.experts.groups
        inner = self.router_class.experts_per_token(self.config, experts // groups)
        if groups == 1:
            return inner
        return inner * (
            self.router_class.experts_per_token(self.config, groups) if self.experts.pick_groups else groups
        )

    def build(self, context: RouterBuildContext) -> Router:
        """Build the router, or the routers of the groups behind one."""
        context = replace(context, num_experts=len(self.experts.shapes))
        if self.experts.groups == 1:
            free_E = tuple(shape.kind in WITHOUT_NETWORK for shape in self.experts.shapes)
            return self.router_class(self.config, replace(context, free_E=free_E if any(free_E) else ()))
        pick = self.experts.pick_groups
        return GroupedRouter(self.router_class, self.config, context, self.experts.groups, pick_groups=pick)


def scale_experts_per_token(router_class: type[Router], config: Any, factor: int, num_experts: int) -> Any:
    """Return the router's configuration with `factor` times as many experts per token, of `num_experts`.

    Raises UsageError for a router whose number of experts per token is fixed.
    """
    grows = router_class.experts_per_token(config, num_experts) >= num_experts  # it takes all there are
    if factor == 1 or grows:
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


def moe_layer(
    routed: Routed,
    router: Router,
    bank: Bank,
    *,
    layout: LayoutConfig,
    layer: int | str,
    shared: FeedForward | None = None,
) -> MoELayer:
    """Put router and bank together."""
    return MoELayer(
        router,
        bank,
        experts_per_token=routed.experts_per_token,
        capacity=Capacity.from_layout(layout),
        layer=layer,
        shared=shared,
        residual=routed.experts.residual,
        expert_dropout=layout.expert_dropout,
    )


def feed_forward_experts(
    routed: Routed,
    router: Router,
    *,
    d_model: int,
    activation: str,
    out_scale: float,
    layout: LayoutConfig,
    layer: int | str,
) -> Callable[[Widths], MoELayer]:
    """Return what builds the MoE layer of a block for given widths; the router is the same for all of them."""
    experts = routed.experts

    def build(widths: Widths) -> MoELayer:
        shared = None
        if experts.shared:
            shared = FeedForward(d_model, widths.of(experts.shared), activation, out_scale)
        bank = bank_of(experts.shapes, widths, d_model, activation, out_scale, recompute=layout.recompute)
        return moe_layer(routed, router, bank, layout=layout, layer=layer, shared=shared)

    return build
