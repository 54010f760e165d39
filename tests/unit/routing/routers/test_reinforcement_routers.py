"""Reinforcement routers: unbiased gradients, losses, state by hand."""

import math
from typing import Any

import pytest
import torch
from support.cases import Case, Tokens, randomise_parameters, route
from support.policy_routers import WIDTH, build_router, make_context, record_of
from torch import Tensor, nn

from moebench.ranks import Span
from moebench.routing.composite import GroupedRouter
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.values import LayerRecord, Routing
from moebench.tasks.task import Batch
from moebench.training.objective import LossNormalizer, add_token_loss, compute_objective

SIGMAS = 5


def compute_gradient(loss: Tensor, router: nn.Module) -> Tensor:
    gradients = torch.autograd.grad(loss, list(router.gate.parameters()))
    return torch.cat([value.flatten() for value in gradients])


BASELINES = {
    "none": {"baseline": "none"},
    "mean": {"baseline": "mean"},
    "learned": {"baseline": "learned", "value": 0.0},
}


@pytest.mark.parametrize("baseline", BASELINES)
def test_policy_gradient_of_categorical_actions_is_unbiased(baseline: str) -> None:
    num_tokens, loss_E = 40_000, torch.tensor([1.0, 3.0])
    router = build_router("reinforce", 2, entropy=0.0, **BASELINES[baseline])
    router.mean.fill_(-2.3)
    router.num_steps.fill_(1)
    x_TD = torch.tensor([[0.5, -1.0, 0.8]]).expand(num_tokens, -1)
    routing = router(x_TD, make_context(num_tokens))
    sampled = compute_gradient(router.objective(record_of(routing, loss_E[routing.expert_N])).mean(), router)
    exact = compute_gradient(router.gate(x_TD[:1]).softmax(-1) @ loss_E, router)
    # One draw of an element is (loss - b) · (1[a = e] - π_e) · x_d: no more than 3 + |v| in size, with |x| <= 1.
    assert exact.abs().max() > 0.3
    assert (sampled - exact).abs().max() < SIGMAS * 4 / math.sqrt(num_tokens)


def test_policy_gradient_of_bernoulli_actions_is_unbiased() -> None:
    num_tokens = 40_000
    router = build_router("conditional_computation", 2, entropy=0.0, baseline="none", average_experts=1)
    router.bias_E.data.zero_()
    loss_UU = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # by whether each of the two experts is on
    x_TD = torch.tensor([[0.5, -1.0, 0.8]]).expand(num_tokens, -1)
    routing = router(x_TD, make_context(num_tokens))
    on_TE = routing.counted_N.view(num_tokens, 2).long()
    sampled = compute_gradient(router.objective(record_of(routing, loss_UU[on_TE[:, 0], on_TE[:, 1]])).mean(), router)
    probability_E = (router.gate(x_TD[:1]) + router.bias_E).sigmoid()[0]
    probability_EU = torch.stack([1 - probability_E, probability_E], dim=-1)
    exact = compute_gradient(torch.einsum("i,j,ij->", probability_EU[0], probability_EU[1], loss_UU), router)
    assert exact.abs().max() > 0.3
    assert (sampled - exact).abs().max() < SIGMAS * 6 / math.sqrt(num_tokens)


@pytest.mark.parametrize("name", ["reinforce", "routing_networks", "conditional_computation"])
def test_objective_increases_the_entropy(name: str) -> None:
    router = build_router(name, 4, policy=0.0, entropy=1.0)
    x_TD = Tokens.draw(32).x_TD[:, :WIDTH]
    entropies = []
    for _ in range(2):
        routing = router(x_TD, make_context(32, domain_T=torch.zeros(32, dtype=torch.int64)))
        entropies.append(routing.token_extras["entropy_T"].mean().item())
        loss = router.objective(record_of(routing, torch.rand(32))).mean()
        for parameter, grad in zip(router.parameters(), torch.autograd.grad(loss, router.parameters()), strict=True):
            parameter.data -= 0.1 * grad
    assert entropies[1] > entropies[0]


def test_running_mean_by_hand() -> None:
    router = build_router("reinforce", 2, decay=0.75)
    routing = router(torch.ones(4, WIDTH), make_context(4))
    padding_T = torch.tensor([True, True, False, False])
    means = []
    for loss, valid_T in ((2.0, None), (4.0, None), (9.0, ~padding_T & padding_T), (6.0, padding_T), (4.0, None)):
        record = record_of(routing, torch.tensor([loss, loss, 1e6 if valid_T is not None else loss, loss]), valid_T)
        router.after_step(routing.load_E, router.statistics(record))
        means.append(router.mean.item())
    # -2;  half-way to -4;  padding only;  a third of the way to -6;  a quarter of the way to -4 (1 - decay).
    assert means == pytest.approx([-2.0, -3.0, -3.0, -4.0, -4.0])


def test_first_step_has_no_policy_gradient() -> None:
    router = build_router("reinforce", 2, entropy=0.0)
    routing = router(torch.ones(4, WIDTH), make_context(4))
    record = record_of(routing, torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert not router.objective(record).any()
    router.after_step(routing.load_E, router.statistics(record))
    advantage_T = router.objective(record) / -routing.token_extras["log_policy_T"]
    torch.testing.assert_close(advantage_T, torch.tensor([1.5, 0.5, -0.5, -1.5]))  # -loss - (-2.5)


def test_value_head_is_trained_by_its_error_and_does_not_reach_the_tokens() -> None:
    router = build_router("reinforce", 2, entropy=0.0, policy=1.0, baseline="learned", value=0.5)
    router.mean.fill_(-2.0)
    router.num_steps.fill_(1)
    x_TD = torch.tensor([[0.5, -1.0, 0.8]], requires_grad=True)
    routing = router(x_TD, make_context(1))
    value = routing.token_extras["value_T"].item()
    loss = router.objective(record_of(routing, torch.tensor([5.0]))).sum()
    head_gradient, token_gradient = torch.autograd.grad(loss, [router.value.weight_ED, x_TD])
    # Huber with δ = 1 is linear that far from the target -5 - (-2) = -3: its slope is 1, times 0.5.
    assert value + 3 > 1
    torch.testing.assert_close(head_gradient, 0.5 * x_TD.detach())
    slope = (torch.eye(2)[routing.expert_N] - routing.scores_TE).detach() @ router.gate.weight_ED.detach()
    torch.testing.assert_close(token_gradient, (3 + value) * slope)  # (R - b) log π, R - b = -3 - value


class StubLayer:
    """The layer around a router, as `objective` sees it."""

    def __init__(self, router: Router) -> None:
        self.router = router


def test_objective_adds_up_over_micro_batches_without_padding() -> None:
    router = build_router("reinforce", 4)
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
        routing = router(x_TD[tokens], make_context(12, span=Span(start=tokens.start, length=len(valid_T), total=12)))
        record = LayerRecord(routing=routing, kept=routing, valid_T=valid_T)
        layers: Any = [StubLayer(router)]
        seen = add_token_loss([record], loss_BL[rows], batch)
        return compute_objective(loss_BL[rows], batch, layers, seen, {}, share).weighted["objective"]

    full_step = total(slice(0, 3), None)
    share = LossNormalizer(num_predictions=7, num_parts=2)
    parts = [total(slice(0, 1), share), total(slice(1, 3), share)]
    torch.testing.assert_close(torch.stack(parts).mean(), full_step)
    assert 0 < full_step.abs() < 100


@pytest.mark.parametrize("pick_groups", [True, False], ids=["hierarchical", "prototypes"])
def test_objective_of_groups_uses_the_joint_probability(pick_groups: bool) -> None:
    router_class = ROUTERS.get("reinforce").item
    config = router_class.Config(entropy=0.0, baseline="none")
    grouped = randomise_parameters(
        GroupedRouter(router_class, config, RouterBuildContext(d_model=8, num_experts=8), 4, pick_groups=pick_groups)
    )
    routing = route(grouped, Tokens.draw(16), training=True)
    loss_T = torch.rand(16)
    # log π of all actions of a token: its group and the expert in it, or one expert in each group.
    parts = torch.stack([part.token_extras["log_policy_T"] for part in routing.parts])
    log_T = parts.sum(0)
    if pick_groups:
        log_T = (parts * routing.picked_TG.T).sum(0) + routing.outer.token_extras["log_policy_T"]
    torch.testing.assert_close(grouped.objective(record_of(routing, loss_T)), loss_T * log_T)


def test_evaluation_takes_the_most_likely_expert() -> None:
    for name in ("reinforce", "routing_networks"):
        routing = route(Case(name).router(), Tokens.draw(64), training=False)
        assert torch.equal(routing.expert_N, routing.logits_TE.argmax(-1))
        assert (routing.weight_N == 1).all()


def test_losses_of_conditional_computation_by_hand() -> None:
    router = build_router("conditional_computation", 4, average_experts=1)  # τ = 1/4

    def losses(scores_TE: Tensor) -> list[float]:
        routing = Routing.from_table(scores_TE, scores_TE > 0.5, scores_TE=scores_TE)
        return [value.item() for value in router.losses(record_of(routing, torch.ones(len(scores_TE)))).values()]

    assert losses(torch.full((8, 4), 0.25)) == pytest.approx([0.0, 0.0, 1.0])  # on target, all tokens treated alike
    # Each token its own expert: on target both ways, and of 1/4 (1 - 1/4) each variance has 3/4 of the largest.
    assert losses(torch.eye(4)) == pytest.approx([0.0, 0.0, 0.25], abs=1e-6)
    # All tokens to the first expert: a token is on target, the experts are 3, -1, -1, -1 relative to it.
    assert losses(torch.eye(4)[:1].expand(8, -1)) == pytest.approx([3.0, 0.0, 1.0], abs=1e-6)
    # Half of the tokens have all experts, half none: 4 times the target or none.
    assert losses(torch.ones(2, 4) * torch.tensor([[1.0], [0.0]])) == pytest.approx([1.0, 5.0, 0.0], abs=1e-6)


def test_conditional_computation_starts_at_the_target() -> None:
    router = Case("conditional_computation", 8, {"average_experts": 2}).fresh_router()
    load_E = route(router, Tokens.draw(4000), training=True).load_E
    deviation = math.sqrt(4000 * 0.25 * 0.75)
    assert (load_E - 1000).abs().max() < 2 * SIGMAS * deviation  # the gate's first weights add a little
