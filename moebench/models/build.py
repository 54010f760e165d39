"""From a cell's configuration to its backbone: the place where names become modules."""

from dataclasses import dataclass

from torch import Tensor, nn

from moebench.errors import UsageError, unknown
from moebench.experts.feed_forward import ExpertBank, FeedForward, ffn_flops
from moebench.experts.layer import MoELayer
from moebench.experts.layout import LAYOUTS, matched_width
from moebench.models.attention import Attention
from moebench.models.transformer import Block, Transformer
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS, Site
from moebench.schema import CellConfig


def check_router(config: CellConfig) -> None:
    """Raise UsageError when the router's options do not fit the layout or name an unknown loss."""
    entry = ROUTERS.get(config.router.name, where="router.name")
    entry.item.check(config.router, config.layout.num_experts)
    known = {*LOSSES.names(), *entry.facts.own_losses}
    for loss, coefficient in config.router.losses.items():
        if loss not in known:
            raise unknown("router.losses", loss, known)
        if not coefficient >= 0:
            raise UsageError(f"router.losses.{loss} must be at least 0, got {coefficient}")


def build_backbone(
    config: CellConfig,
    *,
    causal: bool,
    vocab_size: int | None = None,
    token_count_V: Tensor | None = None,
    sequence_length: int | None = None,
) -> Transformer:
    """Build the transformer with the layout's banks of experts behind the router; weights are not drawn yet."""
    check_router(config)
    places = LAYOUTS.get(config.layout.name).item.places(config.layout, config.model.num_layers)
    sizes = config.model
    out_scale = (2 * sizes.num_layers) ** -0.5  # two additions per block keep the residual stream near unit variance
    blocks = []
    for layer, holds_experts in enumerate(places):
        attention = Attention(
            sizes.d_model, sizes.num_heads, causal=causal, rope_theta=sizes.rope_theta, out_scale=out_scale
        )
        site = Site(
            d_model=sizes.d_model,
            num_experts=config.layout.num_experts,
            layer=layer,
            vocab_size=vocab_size,
            token_count_V=token_count_V,
            sequence_length=sequence_length,
        )
        part = _moe_layer(config, site, out_scale) if holds_experts else None
        dense = FeedForward(sizes.d_model, sizes.ffn_width, sizes.activation, out_scale)
        blocks.append(Block(sizes.d_model, attention, part or dense))
    return Transformer(sizes.d_model, blocks)


def _moe_layer(config: CellConfig, site: Site, out_scale: float) -> MoELayer | None:
    """Return the layer of one block; None for the dense baseline."""
    router_class = ROUTERS.get(config.router.name).item
    if router_class.is_dense:
        return None
    router = router_class(config.router, site)
    experts_per_token = router_class.experts_per_token(config.router, site.num_experts)
    sizes = config.model
    width = config.layout.expert_width
    if width is None:
        unit_flops = ffn_flops(site.d_model, 1, sizes.activation)
        width = matched_width(sizes.ffn_width, experts_per_token, router.flops_per_token() / unit_flops)
    return MoELayer(
        router,
        ExpertBank(site.d_model, width, site.num_experts, sizes.activation, out_scale),
        experts_per_token=experts_per_token,
        capacity=config.layout.capacity,
        layer=site.layer,
        expert_dropout=config.layout.expert_dropout,
    )


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs, counted exactly."""

    total_params: int
    active_params: int
    """Parameters that one token uses: of a bank, the share experts per token / experts."""
    flops_per_token: int
    """Forward FLOPs of one token in a full sequence, 2 per multiplication and addition; training costs 3 times this."""


def cost_of(backbone: Transformer, extra: list[nn.Module], sequence_length: int) -> Cost:
    """Count a backbone and the modules around it (embedding: no FLOPs; head: 2 per weight)."""
    total = sum(parameter.numel() for module in (backbone, *extra) for parameter in module.parameters())
    idle = 0
    flops = sum(2 * module.weight.numel() for module in extra if isinstance(module, nn.Linear))
    for block in backbone.blocks:
        assert isinstance(block, Block)
        part = block.feed_forward
        flops += block.attention.flops_per_token(sequence_length)
        flops += part.flops_per_token()
        if isinstance(part, MoELayer):
            per_expert = sum(parameter.numel() for parameter in part.bank.parameters()) // part.bank.num_experts
            idle += per_expert * (part.bank.num_experts - part.experts_per_token)
    return Cost(total_params=total, active_params=total - idle, flops_per_token=flops)
