"""Routing networks and their weighted policy learner: actions, agents, rewards, updates by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, run
from support.policy_routers import WIDTH, build_router, make_context, record_of
from torch import Tensor

from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.routing.routers.routing_networks_wpl import project_to_simplex
from moebench.routing.values import LayerRecord, Routing


@pytest.mark.parametrize("name", ["routing_networks", "routing_networks_wpl"])
def test_pass_through_uses_no_expert(name: str) -> None:
    layer: MoELayer = Case(name, 2, {"pass_through": True}).layer()
    y_TD, record = run(layer, Tokens.draw(64), training=True)
    passed_T = record.routing.token_extras["action_T"] == 2
    assert 0 < passed_T.sum() < 64
    assert not y_TD[passed_T].any()  # the token keeps its residual
    assert torch.equal(record.kept.experts_per_token_T, (~passed_T).long())


@pytest.mark.parametrize("name", ["routing_networks", "routing_networks_wpl"])
def test_each_domain_has_its_own_agent(name: str) -> None:
    router = build_router(name, 4, num_domains=2)
    if name == "routing_networks_wpl":
        router.policy_GA.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]))
        expected = [3, 3, 0, 0]
    else:
        logits_GE = (router.gate.weight_ED @ torch.ones(WIDTH)).view(2, 4)
        expected = [int(logits_GE[g].argmax()) for g in (0, 0, 1, 1)]
        assert expected[0] != expected[2]
    domain_T = torch.tensor([0, 0, 1, 1])
    routing = router(torch.ones(4, WIDTH), make_context(4, training=False, domain_T=domain_T))
    assert routing.expert_N.tolist() == expected
    with pytest.raises(UsageError, match=f"^router.name: '{name}' routes by domain, which this task does not have$"):
        build_router(name, 4, num_domains=0)
    build_router(name, 4, num_domains=0, agents="single")


def record_actions(router: Any, action_T: Tensor, loss_T: Tensor, agent_T: Tensor | None = None) -> LayerRecord:
    """Return the record of given actions."""
    agent_T = torch.zeros_like(action_T) if agent_T is None else agent_T
    num_tokens = len(action_T)
    extras = {"action_T": action_T, "agent_T": agent_T, "log_policy_T": torch.ones(num_tokens)}
    extras["entropy_T"] = torch.zeros(num_tokens)
    routing = Routing.from_top_k(
        action_T.clamp(max=router.num_experts - 1).unsqueeze(-1),
        torch.ones(num_tokens, 1),
        num_experts=router.num_experts,
        token_extras=extras,
    )
    return record_of(routing.keep(action_T < router.num_experts), loss_T)


def test_collaboration_rewards_the_running_share() -> None:
    router = build_router("routing_networks", 2, collaboration=0.4, pass_through=True, decay=0.0)
    record = record_actions(router, torch.tensor([0, 0, 0, 1, 2]), torch.ones(5))
    torch.testing.assert_close(router.reward(record), -torch.ones(5))
    router.after_step(record.routing.load_E, router.statistics(record))
    # Three of four expert choices were expert 0; passing through has no reward.
    torch.testing.assert_close(router.reward(record), torch.tensor([0.3, 0.3, 0.3, 0.1, 0.0]) - 1)


def test_weighted_policy_learner_by_hand() -> None:
    router = build_router("routing_networks_wpl", 2, rate=0.4)
    record = record_actions(router, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    router.after_step(record.routing.load_E, router.statistics(record))
    assert (router.policy_GA == 0.5).all(), "no update before a mean is known"
    router.after_step(record.routing.load_E, router.statistics(record))
    # R̄ = -2. Better by 1 in half of the tokens, worse by 1 in the others: Δ = ±0.5, weighted by 1 - π = π = 0.5.
    torch.testing.assert_close(router.policy_GA, torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    for _ in range(300):
        action_T = router(torch.ones(32, WIDTH), make_context(32)).token_extras["action_T"]
        record = record_actions(router, action_T, 1.0 + 2 * action_T)
        router.after_step(record.routing.load_E, router.statistics(record))
        torch.testing.assert_close(router.policy_GA.sum(-1), torch.ones(2))
        assert (router.policy_GA >= 0).all()
    assert router.policy_GA[0, 0] > 0.9  # the better action
    assert router.policy_GA[1].tolist() == [0.5, 0.5]  # an agent without tokens


def test_wpl_weights_each_token_by_the_sign_of_its_advantage() -> None:
    # R̄ = 0, π = (.9, .1), four tokens. The two of action 0 are better and worse by 1: .1 · 1 - .9 · 1 = -.8, a mean of
    # -.2 over the four, times .3 is -.06; the nearest probabilities to (.84, .1) are (.87, .13).
    router = build_router("routing_networks_wpl", 2, rate=0.3, decay=0.0, agents="single")
    router.policy_GA.copy_(torch.tensor([[0.9, 0.1]]))
    router.num_steps_G.fill_(5)
    record = record_actions(router, torch.tensor([0, 0, 1, 1]), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    halves = [record_actions(router, torch.tensor([0, 1]), torch.tensor([loss, 0.0])) for loss in (-1.0, 1.0)]
    total, first, second = (router.statistics(each) for each in (record, *halves))
    for name, value in total.items():
        assert torch.equal(value, first[name] + second[name]), "sums must add up over parts of a step"
    router.after_step(record.routing.load_E, total)
    torch.testing.assert_close(router.policy_GA, torch.tensor([[0.87, 0.13]]))
    assert router.mean_G.item() == 0


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_projection_is_the_nearest_point_of_the_simplex(values: list[float], seed: int) -> None:
    value_GA = torch.tensor([values])
    nearest_GA = project_to_simplex(value_GA)
    assert (nearest_GA >= 0).all()
    assert nearest_GA.sum().item() == pytest.approx(1, abs=1e-5)
    other_GA = torch.rand(50, len(values), generator=torch.Generator().manual_seed(seed))
    other_GA = other_GA / other_GA.sum(-1, keepdim=True).clamp(min=1e-9)
    assert (value_GA - nearest_GA).norm() <= (value_GA - other_GA).norm(dim=-1).min() + 1e-5


def test_projection_by_hand() -> None:
    # 1.2 - θ and 0.3 - θ make 1 with θ = 0.25, and the third value is below it.
    torch.testing.assert_close(project_to_simplex(torch.tensor([[1.2, 0.3, -0.5]])), torch.tensor([[0.95, 0.05, 0.0]]))
