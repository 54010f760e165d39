"""Routers that learn from rewards: gradients without bias, losses and states worked by hand, actions and agents."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, randomise_parameters, route, run
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.ranks import Span
from moebench.routing.composite import GroupedRouter
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.routers.routing_networks_wpl import onto_simplex
from moebench.routing.values import LayerRecord, Routing
from moebench.tasks.task import Batch
from moebench.training.objective import LossNormalizer, add_token_loss, compute_objective

SIGMAS = 5
WIDTH = 3


def build(name: str, num_experts: int, *, num_domains: int = 2, **options: Any) -> Any:
    """Build a router over vectors of 3 numbers."""
    router_class = ROUTERS.get(name).item
    context = RouterBuildContext(d_model=WIDTH, num_experts=num_experts, num_domains=num_domains)
    return randomise_parameters(router_class(router_class.Config(**options), context))


def context(num_tokens: int, *, training: bool = True, seed: int = 0, **known: Any) -> RouteContext:
    generator = torch.Generator().manual_seed(seed)
    return RouteContext(training=training, generator=generator, sequence_length=max(num_tokens, 1), **known)


def record_of(routing: Routing, token_loss_T: Tensor, valid_T: Tensor | None = None) -> LayerRecord:
    return LayerRecord(routing=routing, kept=routing, valid_T=valid_T, token_loss_T=token_loss_T)


def gradient(loss: Tensor, router: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(router.gate.parameters()))
    return torch.cat([value.flatten() for value in found])


BASELINES = {
    "none": {"baseline": "none"},
    "mean": {"baseline": "mean"},
    "learned": {"baseline": "learned", "value": 0.0},
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_mean_of_draws_is_the_gradient_of_the_expected_loss(baseline: str) -> None:
    num_tokens, loss_E = 40_000, torch.tensor([1.0, 3.0])
    router = build("reinforce", 2, entropy=0.0, **BASELINES[baseline])
    router.mean.fill_(-2.3)
    router.num_steps.fill_(1)
    x_TD = torch.tensor([[0.5, -1.0, 0.8]]).expand(num_tokens, -1)
    routing = router(x_TD, context(num_tokens))
    sampled = gradient(router.objective(record_of(routing, loss_E[routing.expert_N])).mean(), router)
    exact = gradient(router.gate(x_TD[:1]).softmax(-1) @ loss_E, router)
    # One draw of an element is (loss - b) · (1[a = e] - π_e) · x_d: no more than 3 + |v| in size, with |x| <= 1.
    assert exact.abs().max() > 0.3
    assert (sampled - exact).abs().max() < SIGMAS * 4 / math.sqrt(num_tokens)


def test_mean_of_coins_is_the_gradient_of_the_expected_loss() -> None:
    num_tokens = 40_000
    router = build("conditional_computation", 2, entropy=0.0, baseline="none", average_experts=1)
    router.bias_E.data.zero_()
    loss_UU = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # by whether each of the two experts is on
    x_TD = torch.tensor([[0.5, -1.0, 0.8]]).expand(num_tokens, -1)
    routing = router(x_TD, context(num_tokens))
    on_TE = routing.counted_N.view(num_tokens, 2).long()
    sampled = gradient(router.objective(record_of(routing, loss_UU[on_TE[:, 0], on_TE[:, 1]])).mean(), router)
    chance_E = (router.gate(x_TD[:1]) + router.bias_E).sigmoid()[0]
    chances_EU = torch.stack([1 - chance_E, chance_E], dim=-1)
    exact = gradient(torch.einsum("i,j,ij->", chances_EU[0], chances_EU[1], loss_UU), router)
    assert exact.abs().max() > 0.3
    assert (sampled - exact).abs().max() < SIGMAS * 6 / math.sqrt(num_tokens)


@pytest.mark.parametrize("name", ["reinforce", "routing_networks", "conditional_computation"])
def test_entropy_is_rewarded(name: str) -> None:
    router = build(name, 4, policy=0.0, entropy=1.0)
    x_TD = Tokens.draw(32).x_TD[:, :WIDTH]
    entropies = []
    for _ in range(2):
        routing = router(x_TD, context(32, domain_T=torch.zeros(32, dtype=torch.int64)))
        entropies.append(routing.token_extras["entropy_T"].mean().item())
        loss = router.objective(record_of(routing, torch.rand(32))).mean()
        for parameter, grad in zip(router.parameters(), torch.autograd.grad(loss, router.parameters()), strict=True):
            parameter.data -= 0.1 * grad
    assert entropies[1] > entropies[0]


def test_running_mean_by_hand() -> None:
    router = build("reinforce", 2, decay=0.75)
    routing = router(torch.ones(4, WIDTH), context(4))
    padding_T = torch.tensor([True, True, False, False])
    means = []
    for loss, valid_T in ((2.0, None), (4.0, None), (9.0, ~padding_T & padding_T), (6.0, padding_T), (4.0, None)):
        record = record_of(routing, torch.tensor([loss, loss, 1e6 if valid_T is not None else loss, loss]), valid_T)
        router.after_step(routing.load_E, router.statistics(record))
        means.append(router.mean.item())
    # -2;  half-way to -4;  nothing but padding;  a third of the way to -6;  a quarter of the way to -4 (1 - decay).
    assert means == pytest.approx([-2.0, -3.0, -3.0, -4.0, -4.0])


def test_nothing_is_learned_before_a_reward_can_be_compared() -> None:
    router = build("reinforce", 2, entropy=0.0)
    routing = router(torch.ones(4, WIDTH), context(4))
    record = record_of(routing, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert not router.objective(record).any()
    router.after_step(routing.load_E, router.statistics(record))
    advantage_T = router.objective(record) / -routing.token_extras["log_policy_T"]
    torch.testing.assert_close(advantage_T, torch.tensor([1.5, 0.5, -0.5, -1.5]))  # -loss - (-2.5)


def test_value_head_learns_by_its_error_alone_and_shapes_no_token() -> None:
    router = build("reinforce", 2, entropy=0.0, policy=1.0, baseline="learned", value=0.5)
    router.mean.fill_(-2.0)
    router.num_steps.fill_(1)
    x_TD = torch.tensor([[0.5, -1.0, 0.8]], requires_grad=True)
    routing = router(x_TD, context(1))
    value = routing.token_extras["value_T"].item()
    loss = router.objective(record_of(routing, torch.tensor([5.0]))).sum()
    to_head, to_token = torch.autograd.grad(loss, [router.value.weight_ED, x_TD])
    # Huber with δ = 1 is linear that far from the target -5 - (-2) = -3: its slope is 1, times 0.5.
    assert value + 3 > 1
    torch.testing.assert_close(to_head, 0.5 * x_TD.detach())
    slope = (torch.eye(2)[routing.expert_N] - routing.scores_TE).detach() @ router.gate.weight_ED.detach()
    torch.testing.assert_close(to_token, (3 + value) * slope)  # of (R - b) log π alone, with R - b = -3 - value


class Behind:
    """Stands for the layer around a router."""

    def __init__(self, router: Router) -> None:
        self.router = router


def test_objective_of_parts_adds_up_to_that_of_the_step_and_padding_counts_nowhere() -> None:
    router = build("reinforce", 4)
    router.num_steps.fill_(1)
    x_TD, loss_BL = torch.randn(12, WIDTH), torch.rand(3, 4)
    valid_BL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    loss_BL = loss_BL.where(valid_BL, 1e9)
    zeros_BL = torch.zeros(3, 4, dtype=torch.int64)

    def total(rows: slice, share: LossNormalizer | None) -> Tensor:
        tokens = slice(4 * rows.start, 4 * rows.stop)
        zeros = dict.fromkeys(("input_BL", "target_BP", "weight_BP"), zeros_BL[rows])
        masks = {"valid_BL": valid_BL[rows], "count_BP": valid_BL[rows].long()}
        batch = Batch(**zeros, **masks, domain_B=zeros_BL[rows, 0])
        valid_T = valid_BL[rows].reshape(-1)
        routing = router(x_TD[tokens], context(12, span=Span(start=tokens.start, length=len(valid_T), total=12)))
        record = LayerRecord(routing=routing, kept=routing, valid_T=valid_T)
        layers: Any = [Behind(router)]
        seen = add_token_loss([record], loss_BL[rows], batch)
        return compute_objective(loss_BL[rows], batch, layers, seen, {}, share).weighted["objective"]

    whole = total(slice(0, 3), None)
    share = LossNormalizer(num_predictions=7, num_parts=2)
    parts = [total(slice(0, 1), share), total(slice(1, 3), share)]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    assert 0 < whole.abs() < 100


@pytest.mark.parametrize("pick_groups", [True, False], ids=["hierarchical", "prototypes"])
def test_objective_of_groups_is_that_of_the_joint_choice(pick_groups: bool) -> None:
    router_class = ROUTERS.get("reinforce").item
    config = router_class.Config(entropy=0.0, baseline="none")
    both = randomise_parameters(
        GroupedRouter(router_class, config, RouterBuildContext(d_model=8, num_experts=8), 4, pick_groups=pick_groups)
    )
    routing = route(both, Tokens.draw(16), training=True)
    loss_T = torch.rand(16)
    # log π of all that was drawn for a token: the group and the expert in it, or one expert in each group.
    parts = torch.stack([part.token_extras["log_policy_T"] for part in routing.parts])
    log_T = parts.sum(0)
    if pick_groups:
        log_T = (parts * routing.picked_TG.T).sum(0) + routing.outer.token_extras["log_policy_T"]
    torch.testing.assert_close(both.objective(record_of(routing, loss_T)), loss_T * log_T)


def test_evaluation_takes_the_most_likely_expert() -> None:
    for name in ("reinforce", "routing_networks"):
        routing = route(Case(name).router(), Tokens.draw(64), training=False)
        assert torch.equal(routing.expert_N, routing.logits_TE.argmax(-1))
        assert (routing.weight_N == 1).all()


@pytest.mark.parametrize("name", ["routing_networks", "routing_networks_wpl"])
def test_pass_through_leaves_the_token_as_it_is(name: str) -> None:
    layer: MoELayer = Case(name, 2, {"pass_through": True}).layer()
    y_TD, record = run(layer, Tokens.draw(64), training=True)
    passed_T = record.routing.token_extras["action_T"] == 2
    assert 0 < passed_T.sum() < 64
    assert not y_TD[passed_T].any()  # the residual stream goes on without a change
    assert torch.equal(record.kept.experts_per_token_T, (~passed_T).long())


@pytest.mark.parametrize("name", ["routing_networks", "routing_networks_wpl"])
def test_each_domain_has_its_own_agent(name: str) -> None:
    router = build(name, 4, num_domains=2)
    if name == "routing_networks_wpl":
        router.policy_GA.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]))
        expected = [3, 3, 0, 0]
    else:
        logits_GE = (router.gate.weight_ED @ torch.ones(WIDTH)).view(2, 4)
        expected = [int(logits_GE[g].argmax()) for g in (0, 0, 1, 1)]
        assert expected[0] != expected[2]
    domain_T = torch.tensor([0, 0, 1, 1])
    routing = router(torch.ones(4, WIDTH), context(4, training=False, domain_T=domain_T))
    assert routing.expert_N.tolist() == expected
    with pytest.raises(UsageError, match=f"^router.name: '{name}' routes by domain, which this task does not have$"):
        build(name, 4, num_domains=0)
    build(name, 4, num_domains=0, agents="single")


def acting(router: Any, action_T: Tensor, loss_T: Tensor, agent_T: Tensor | None = None) -> LayerRecord:
    """Return the record of some actions, as if they had been drawn."""
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


def test_collaboration_pays_the_share_that_an_expert_had() -> None:
    router = build("routing_networks", 2, collaboration=0.4, pass_through=True, decay=0.0)
    record = acting(router, torch.tensor([0, 0, 0, 1, 2]), torch.ones(5))
    torch.testing.assert_close(router.reward(record), -torch.ones(5))
    router.after_step(record.routing.load_E, router.statistics(record))
    # Three of four choices of an expert were of the first; passing on pays nothing.
    torch.testing.assert_close(router.reward(record), torch.tensor([0.3, 0.3, 0.3, 0.1, 0.0]) - 1)


def test_weighted_policy_learner_by_hand() -> None:
    router = build("routing_networks_wpl", 2, rate=0.4)
    record = acting(router, torch.tensor([0, 0, 1, 1]), torch.tensor([1.0, 1.0, 3.0, 3.0]))
    router.after_step(record.routing.load_E, router.statistics(record))
    assert (router.policy_GA == 0.5).all(), "nothing to compare with before the first step"
    router.after_step(record.routing.load_E, router.statistics(record))
    # R̄ = -2. Better by 1 in half of the tokens, worse by 1 in the others: Δ = ±0.5, weighted by 1 - π = π = 0.5.
    torch.testing.assert_close(router.policy_GA, torch.tensor([[0.6, 0.4], [0.5, 0.5]]))
    for _ in range(300):
        action_T = router(torch.ones(32, WIDTH), context(32)).token_extras["action_T"]
        record = acting(router, action_T, 1.0 + 2 * action_T)
        router.after_step(record.routing.load_E, router.statistics(record))
        torch.testing.assert_close(router.policy_GA.sum(-1), torch.ones(2))
        assert (router.policy_GA >= 0).all()
    assert router.policy_GA[0, 0] > 0.9  # it was worth more
    assert router.policy_GA[1].tolist() == [0.5, 0.5]  # the agent that never acted


def test_each_token_weighs_its_own_advantage() -> None:
    # R̄ = 0, π = (.9, .1), four tokens. The two of action 0 are better and worse by 1: .1 · 1 - .9 · 1 = -.8, a mean of
    # -.2 over the four, times .3 is -.06; the nearest probabilities to (.84, .1) are (.87, .13).
    router = build("routing_networks_wpl", 2, rate=0.3, decay=0.0, agents="single")
    router.policy_GA.copy_(torch.tensor([[0.9, 0.1]]))
    router.num_steps_G.fill_(5)
    record = acting(router, torch.tensor([0, 0, 1, 1]), torch.tensor([-1.0, 1.0, 0.0, 0.0]))
    halves = [acting(router, torch.tensor([0, 1]), torch.tensor([loss, 0.0])) for loss in (-1.0, 1.0)]
    whole, first, second = (router.statistics(each) for each in (record, *halves))
    for name, value in whole.items():
        assert torch.equal(value, first[name] + second[name]), "however a step is divided"
    router.after_step(record.routing.load_E, whole)
    torch.testing.assert_close(router.policy_GA, torch.tensor([[0.87, 0.13]]))
    assert router.mean_G.item() == 0


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=6), st.integers(0, 99))
def test_projection_is_the_nearest_point_of_the_simplex(values: list[float], seed: int) -> None:
    value_GA = torch.tensor([values])
    nearest_GA = onto_simplex(value_GA)
    assert (nearest_GA >= 0).all()
    assert nearest_GA.sum().item() == pytest.approx(1, abs=1e-5)
    other_GA = torch.rand(50, len(values), generator=torch.Generator().manual_seed(seed))
    other_GA = other_GA / other_GA.sum(-1, keepdim=True).clamp(min=1e-9)
    assert (value_GA - nearest_GA).norm() <= (value_GA - other_GA).norm(dim=-1).min() + 1e-5


def test_projection_by_hand() -> None:
    # 1.2 - θ and 0.3 - θ make 1 with θ = 0.25, and the third number is below it.
    torch.testing.assert_close(onto_simplex(torch.tensor([[1.2, 0.3, -0.5]])), torch.tensor([[0.95, 0.05, 0.0]]))


def test_losses_of_conditional_computation_by_hand() -> None:
    router = build("conditional_computation", 4, average_experts=1)  # τ = 1/4

    def losses(scores_TE: Tensor) -> list[float]:
        routing = Routing.from_table(scores_TE, scores_TE > 0.5, scores_TE=scores_TE)
        return [value.item() for value in router.losses(record_of(routing, torch.ones(len(scores_TE)))).values()]

    assert losses(torch.full((8, 4), 0.25)) == pytest.approx([0.0, 0.0, 1.0])  # on target, blind to the tokens
    # Each token its own expert: on target both ways, and of 1/4 (1 - 1/4) each variance has 3/4 of the largest.
    assert losses(torch.eye(4)) == pytest.approx([0.0, 0.0, 0.25], abs=1e-6)
    # All tokens to the first expert: a token is on target, the experts are 3, -1, -1, -1 relative to it.
    assert losses(torch.eye(4)[:1].expand(8, -1)) == pytest.approx([3.0, 0.0, 1.0], abs=1e-6)
    # Half of the tokens have all experts, half none: 4 times as much as wanted or none.
    assert losses(torch.ones(2, 4) * torch.tensor([[1.0], [0.0]])) == pytest.approx([1.0, 5.0, 0.0], abs=1e-6)


def test_conditional_computation_starts_on_target() -> None:
    router = Case("conditional_computation", 8, {"average_experts": 2}).fresh_router()
    load_E = route(router, Tokens.draw(4000), training=True).load_E
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert (load_E - 1000).abs().max() < 2 * SIGMAS * deviation  # the gate's first weights add a little
