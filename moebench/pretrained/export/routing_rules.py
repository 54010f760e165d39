"""How the routers of moebench choose and weight experts in evaluation, where it is the k best of one score each."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moebench.errors import UsageError
from moebench.pretrained.decoders.decoder import RoutingRule

NOT_IN_EVALUATION = (".router.noise_gate.weight_ED",)
"""Endings of weights that only training reads."""


def _top_k(config: Any) -> RoutingRule:
    normalised = config.softmax == "after" or config.renormalise
    return RoutingRule(score="softmax", top_k=config.top_k, normalised=normalised)


def _switch(config: Any) -> RoutingRule:
    return RoutingRule(score="softmax", top_k=1, normalised=False)


def _noisy_top_k(config: Any) -> RoutingRule:
    return RoutingRule(score="softmax", top_k=config.top_k, normalised=True)


def _v_moe(config: Any) -> RoutingRule:
    return RoutingRule(score="softmax", top_k=config.top_k, normalised=False)


def _gshard(config: Any) -> RoutingRule:
    if config.second_expert in ("threshold", "none"):
        raise UsageError(f"router.second_expert={config.second_expert}: in transformers each token uses k experts")
    return RoutingRule(score="softmax", top_k=2, normalised=True)  # what is random is so in training alone


def _deepseek_moe(config: Any) -> RoutingRule:
    if config.kept_groups < config.num_groups:
        raise UsageError(
            f"router.kept_groups={config.kept_groups}: groups are ranked by their best expert, in transformers by their"
            " two best"
        )
    return RoutingRule(score="softmax", top_k=config.top_k, normalised=False, scale=config.scale)


def _loss_free(config: Any) -> RoutingRule:
    return RoutingRule(
        score=config.score,
        top_k=config.top_k,
        normalised=config.renormalise,
        scale=config.scale,
        has_bias=True,
        num_groups=config.num_groups,
        kept_groups=config.kept_groups,
    )


RULES: Mapping[str, Callable[[Any], RoutingRule]] = {
    **dict.fromkeys(("top_k", "mixtral", "olmoe", "frozen_top_k"), _top_k),
    "switch": _switch,
    "noisy_top_k": _noisy_top_k,
    "v_moe": _v_moe,
    **dict.fromkeys(("gshard", "glam", "st_moe"), _gshard),
    "deepseek_moe": _deepseek_moe,
    **dict.fromkeys(("loss_free", "deepseek_v3"), _loss_free),
}
"""Router -> its rule; the others route in another way."""


def describe_routing(config: Any) -> RoutingRule:
    """Return the rule of a configured router; raise UsageError for one that no model of transformers has."""
    if config.name not in RULES:
        raise UsageError(
            f"router.name={config.name}: transformers has no such routing (it has that of {', '.join(RULES)})"
        )
    return RULES[config.name](config)


def computes_same(config: Any, rule: RoutingRule | None) -> bool:
    """Return whether a router weights its experts in evaluation by this rule, whatever their number k.

    A factor on softmax weights does not count: `moebench export` writes it into the experts.
    """
    if rule is None or config.name not in RULES:
        return False
    try:
        ours = RULES[config.name](config)
    except UsageError:
        return False
    scale = rule.scale if rule.score == "softmax" else ours.scale
    return replace(ours, top_k=rule.top_k, scale=scale, router=rule.router) == rule
