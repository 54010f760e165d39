"""LIMoE: V-MoE's selection with top-1, and a global entropy per domain."""

import dataclasses
import math

import pytest
import torch
from support.cases import Case, Tokens, route
from support.identity_gates import record_of
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.context import DataSummary
from moebench.routing.losses import global_entropy, local_entropy
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import LayerRecord


def route_logits(
    logits_TE: Tensor, domain_T: Tensor | None, num_domains: int | None = 2, **options: int
) -> tuple[Router, LayerRecord]:
    """Route tokens of these domains by these logits."""
    num_experts = logits_TE.shape[1]
    router_class = ROUTERS.get("limoe").item
    context = RouterBuildContext(
        d_model=num_experts, num_experts=num_experts, data=DataSummary(num_domains=num_domains)
    )
    router = router_class(router_class.Config(**options), context)
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.eye(num_experts))
        ctx = dataclasses.replace(Tokens.draw(len(logits_TE)).context(training=False), domain_T=domain_T)
        return router, record_of(router(logits_TE, ctx))


def domain_entropy(logits_TE: Tensor, domain_T: Tensor | None, num_domains: int | None = 2, **options: int) -> float:
    """Return the raw loss."""
    router, record = route_logits(logits_TE, domain_T, num_domains, **options)
    return float(router.losses(record)["domain_entropy"])


def test_one_expert_per_domain_satisfies_global_but_not_domain_entropy() -> None:
    # All tokens of domain 0 choose expert 0, those of domain 1 expert 1: over all tokens both are used evenly.
    domain_T = torch.tensor([0, 0, 1, 1])
    logits_TE = 50 * torch.eye(2)[domain_T]
    _, record = route_logits(logits_TE, domain_T)
    assert float(global_entropy(record)) == pytest.approx(0, abs=1e-5)
    assert float(local_entropy(record)) == pytest.approx(0, abs=1e-5)
    assert domain_entropy(logits_TE, domain_T) == pytest.approx(math.log(2), rel=1e-4)


def test_domain_entropy_by_hand() -> None:
    # Domain 0 has two experts of four, domain 1 all of them; the deficit of domain 0 is ln 4 - ln 2.
    logits_TE = 50 * torch.eye(4)[[0, 1, 0, 1, 2, 3]]
    domain_T = torch.tensor([0, 0, 1, 1, 1, 1])
    assert domain_entropy(logits_TE, domain_T) == pytest.approx(math.log(2) / 2, rel=1e-4)
    assert domain_entropy(logits_TE, domain_T, least_experts=2) == pytest.approx(0, abs=1e-5)
    assert domain_entropy(logits_TE, domain_T, num_domains=5) == pytest.approx(math.log(2) / 2, rel=1e-4)
    entropy = -(2 * (1 / 3) * math.log(1 / 3) + 2 * (1 / 6) * math.log(1 / 6))  # loads 2, 2, 1, 1 of six tokens
    assert domain_entropy(logits_TE, None, num_domains=None) == pytest.approx(math.log(4) - entropy, rel=1e-4)
    assert domain_entropy(torch.zeros(6, 4), domain_T) == pytest.approx(0, abs=1e-5)


def test_domains_are_weighted_equally() -> None:
    logits_TE = torch.zeros(100, 4)
    domain_T = torch.zeros(100, dtype=torch.int64)
    logits_TE[0, 0], domain_T[0] = 50, 1
    assert domain_entropy(logits_TE, domain_T) == pytest.approx(math.log(4) / 2, rel=1e-4)


def test_routing_equals_v_moe_with_top_1() -> None:
    tokens = Tokens.draw(32)
    ours, theirs = Case("limoe").router(), Case("v_moe", options={"top_k": 1}).router()
    for training in (True, False):
        a, b = (route(router, tokens, training=training) for router in (ours, theirs))
        assert torch.equal(a.expert_N, b.expert_N)
        assert torch.equal(a.weight_N, b.weight_N)
        assert torch.equal(a.priority_N, b.priority_N)


def test_least_experts_above_num_experts_is_refused() -> None:
    router_class = ROUTERS.get("limoe").item
    with pytest.raises(
        UsageError, match=r"^router\.least_experts must be null or from 1 to layout\.num_experts=8, got 9"
    ):
        router_class.check(router_class.Config(least_experts=9), 8)
