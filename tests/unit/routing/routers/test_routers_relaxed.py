"""ReMoE, SparseMixer, Gumbel and dense-to-sparse: values by hand, gradient estimators, schedules."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run
from support.identity_gates import build_identity_router, expert_weights, record_of, route_logits
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from moebench.errors import UsageError
from moebench.routing.router import Router

SIGMAS = 5
P_E = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def logits_gradient(router: Router, logits_TE: Tensor, pull_E: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return d(Σ weight · pull of the expert)/d logits in training, and the sum itself for each token."""
    logits_TE = logits_TE.clone().requires_grad_()
    routing = route_logits(router, logits_TE, training=True, seed=seed)
    value_N = routing.weight_N * pull_E[routing.expert_N]
    (gradient_TE,) = torch.autograd.grad(value_N.sum(), logits_TE)
    return gradient_TE, value_N.detach()


# ReLU routing


def test_remoe_by_hand() -> None:
    router = build_identity_router("remoe", 4)
    routing = route_logits(router, torch.tensor([[2.0, -1.0, 0.5, 0.0], [-1.0, -2.0, -3.0, -4.0]]))
    assert expert_weights(routing) == {0: 2.0, 2: 0.5}
    assert expert_weights(routing, 1) == {}, "a token may have no expert"
    assert routing.load_E.tolist() == [1, 0, 1, 0]
    # f = E n / (k T) = 4 · (1, 0, 1, 0) / (2 · 2) and mean weights (1, 0, 1/4, 0): 1 · 1 + 1 · 1/4 = 1.25.
    assert router.losses(record_of(routing))["sparsity"].item() == pytest.approx(1.25)
    router.growth.fill_(3.0)
    assert router.losses(record_of(routing))["sparsity"].item() == pytest.approx(3.75)


def test_penalty_at_even_loads_is_the_mean_sum_of_weights() -> None:
    table_TE = torch.tensor([[0.1, 0.7, -1, -1], [-1, 0.2, 0.3, -1], [-1, -1, 0.4, 0.9], [0.5, -1, -1, 0.6]])
    router = build_identity_router("remoe", 4)
    loss = router.losses(record_of(route_logits(router, table_TE)))["sparsity"]
    assert loss.item() == pytest.approx(table_TE.relu().sum().item() / 4)


@given(st.integers(0, 7), st.floats(-1, 1))
def test_remoe_is_continuous_where_an_expert_is_added(expert: int, other: float) -> None:
    # Just below 0 the expert is not used, just above 0 it is used with a tiny weight.
    router = build_identity_router("remoe", 8)
    logits_TE = torch.full((2, 8), other)
    logits_TE[:, expert] = torch.tensor([-1e-6, 1e-6])
    routing = route_logits(router, logits_TE)
    below, above = expert_weights(routing, 0), expert_weights(routing, 1)
    assert expert not in below
    assert above.pop(expert) == pytest.approx(0, abs=1e-5)
    assert above == below


@pytest.mark.parametrize(("num_active", "growth"), [(3, 1.2), (2, 1.0), (1, 1 / 1.2), (0, 1 / 1.2)])
def test_penalty_adapts_to_the_number_of_experts(num_active: int, growth: float) -> None:
    layer = Case("remoe", options={"top_k": 2}).layer()
    with torch.no_grad():
        layer.router.gate.weight_ED.fill_(-1.0)
        layer.router.gate.weight_ED[:num_active] = 1.0
    tokens = Tokens.draw(16)
    tokens.x_TD.abs_()
    for _ in range(2):
        layer.after_step([run(layer, tokens, training=True)[1]])
    assert layer.router.growth.item() == pytest.approx(growth**2)


def test_penalty_converges_to_k_experts() -> None:
    # Starting from half of all experts, the number must settle near k = 1.
    layer = Case("remoe", options={"top_k": 1}).layer()
    layer.router.growth.fill_(1e4)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=1.0)
    active = []
    for step in range(400):
        tokens = Tokens.draw(128, seed=step)
        tokens.x_TD[:, 0] = 1  # a constant feature, so that a logit can be pushed down for every token
        routing = route(layer.router, tokens, training=True)
        pull = (routing.scores_TE - routing.logits_TE.exp().clamp(max=2)).mean()  # a loss that favours more experts
        optimizer.zero_grad()
        (0.05 * pull + 1e-5 * layer.router.losses(record_of(routing))["sparsity"]).backward()
        optimizer.step()
        layer.after_step([record_of(routing)])
        active.append(int(routing.load_E.sum()) / 128)
    assert active[0] > 3
    assert 0.7 < sum(active[-100:]) / 100 < 1.4


# SparseMixer


def test_sparse_mixer_by_hand() -> None:
    # Logits 2, 1.99, 1: within 2ε = 2 % of the best are the first two; p = σ(.01) = .5025 and .4975.
    router = build_identity_router("sparse_mixer", 3, top_k=1)
    logits_TE = torch.tensor([[2.0, 1.99, 1.0]])
    assert expert_weights(route_logits(router, logits_TE)) == pytest.approx({0: 0.5025}, abs=1e-4)
    routing = route_logits(router, logits_TE.expand(4000, -1), training=True)
    assert routing.load_E[2] == 0
    assert abs(int(routing.load_E[1]) - 4000 * 0.4975) < SIGMAS * math.sqrt(1000)
    # The best always has weight p; the other p in a quarter of the draws, otherwise p / 3.
    assert (routing.weight_N[routing.expert_N == 0] - 0.5025).abs().max() < 1e-4
    other_N = routing.weight_N[routing.expert_N == 1]
    assert other_N.min().item() == pytest.approx(0.4975 / 3, abs=1e-4)
    assert other_N.max().item() == pytest.approx(0.4975, abs=1e-4)
    share = (other_N > 0.3).float().mean().item()
    assert share == pytest.approx(0.25, abs=SIGMAS * math.sqrt(0.25 * 0.75 / len(other_N)))


@given(st.integers(0, 50), st.integers(1, 3))
def test_gradient_of_sparse_mixer_is_that_of_the_probability(seed: int, top_k: int) -> None:
    # δ p_i (1_i - p): rows sum to 0, and experts that cannot be sampled get none.
    router = build_identity_router("sparse_mixer", 5, top_k=top_k, tolerance=0.2)
    logits_TE = 1 + 0.3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    gradient_TE, _ = logits_gradient(router, logits_TE, torch.arange(1.0, 6.0), seed)
    torch.testing.assert_close(gradient_TE.sum(-1), torch.zeros(20), rtol=0, atol=1e-5)
    if top_k == 1:
        routing = route_logits(router, logits_TE, training=True, seed=seed)
        highest_T1 = logits_TE.max(-1, keepdim=True).values
        near_TE = (highest_T1 - logits_TE) / logits_TE.abs().maximum(highest_T1) <= 0.4
        p_TE = logits_TE.masked_fill(~near_TE, -torch.inf).softmax(-1)
        sample_T1 = routing.expert_N.unsqueeze(-1)
        one_TE = torch.zeros_like(p_TE).scatter(-1, sample_T1, 1.0)
        expected_TE = (sample_T1 + 1) * p_TE.gather(-1, sample_T1) * (one_TE - p_TE)
        torch.testing.assert_close(gradient_TE, expected_TE, rtol=1e-4, atol=1e-6)


def test_sparse_mixer_without_tolerance_takes_the_best_with_weight_1() -> None:
    routing = route_logits(build_identity_router("sparse_mixer", 4, top_k=2, tolerance=0.0), P_E.log(), training=True)
    assert expert_weights(routing) == {0: 1.0, 1: 1.0}


# Gumbel


def test_gumbel_weight_is_1_with_a_softmax_gradient() -> None:
    router = build_identity_router("gumbel", 4)
    gradient_TE, value_N = logits_gradient(router, P_E.log().expand(2000, -1), torch.ones(4), seed=0)
    assert (value_N == 1).all()
    torch.testing.assert_close(gradient_TE.sum(-1), torch.zeros(2000), rtol=0, atol=1e-5)
    assert gradient_TE.abs().sum() > 0
    load_E = route_logits(router, P_E.log().expand(2000, -1), training=True).load_E
    for load, share in zip(load_E.tolist(), P_E[0].tolist(), strict=True):
        assert abs(load - share * 2000) <= SIGMAS * math.sqrt(2000 * share * (1 - share))
    assert expert_weights(route_logits(router, P_E.log())) == {0: 1.0}, "no sampling in evaluation"


def test_annealing_is_compiled_once_for_all_steps() -> None:
    router, counter = build_identity_router("gumbel", 2), CompileCounter()
    divide = torch.compile(lambda x_T, step: x_T / router._temperature(step), backend=counter)
    for step in range(2, 9):
        assert float(divide(torch.ones(1), step)) == pytest.approx(1 / max(0.5, math.exp(-1e-4 * step)))
    assert counter.frame_count <= 2  # for the first step, and for any


@pytest.mark.parametrize(("step", "temperature"), [(0, 1.0), (1000, math.exp(-0.1)), (100_000, 0.5)])
def test_temperature_of_the_straight_through_gradient(step: int, temperature: float) -> None:
    # Two experts, logits h and 0: d p_0/dh = p_0 p_1 / τ with p = σ((h + noise) / τ); τ follows from the draw.
    router = build_identity_router("gumbel", 2)
    logits_TE = torch.tensor([[0.3, 0.0]], requires_grad=True)
    routing = route_logits(router, logits_TE, training=True, step=step)
    (gradient_TE,) = torch.autograd.grad(routing.weight_N.sum(), logits_TE)
    uniform_TE = torch.rand(1, 2, generator=torch.Generator().manual_seed(0))
    noisy_TE = logits_TE.detach() - (-uniform_TE.log()).log()
    p_E = (noisy_TE / temperature).softmax(-1)[0]
    sign = 1 if int(routing.expert_N) == 0 else -1
    assert gradient_TE[0, 0].item() == pytest.approx(sign * float(p_E.prod()) / temperature, rel=1e-4)


# Dense to sparse


def test_dense_to_sparse_uses_fewer_experts_over_time() -> None:
    router = build_identity_router("dense_to_sparse", 4, dense_steps=100, threshold=0.05)
    logits_TE = P_E.log().expand(500, -1)
    counts = []
    for step in (0, 50, 99, 100):
        routing = route_logits(router, logits_TE, training=True, step=step)
        counts.append(int(routing.load_E.sum()) / 500)
        assert routing.experts_per_token_T.min() >= 1
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3
    assert counts[-1] == 1
    assert expert_weights(route_logits(router, P_E.log())) == pytest.approx({0: 0.4}), "evaluation is top-1"


def test_dense_phase_weights_are_the_gumbel_softmax() -> None:
    router = build_identity_router("dense_to_sparse", 4, threshold=0.0)
    routing = route_logits(router, P_E.log().expand(300, -1), training=True)
    torch.testing.assert_close(routing.weight_N.view(300, 4).sum(-1), torch.ones(300))
    uniform_TE = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    expected_TE = ((P_E.log() - (-uniform_TE.log()).log()) / 2).softmax(-1)
    torch.testing.assert_close(routing.weight_N.view(300, 4), expected_TE, rtol=1e-4, atol=1e-6)


def test_hard_phase_samples_in_training() -> None:
    # Logits (1, 0): expert 1 has the probability 1 / (1 + e) = .2689, which is also its weight when sampled.
    logits_TE = torch.tensor([[1.0, 0.0]]).expand(20_000, -1)
    router = build_identity_router("dense_to_sparse", 2, dense_steps=10)
    routing = route_logits(router, logits_TE, training=True, step=10)
    second = 1 / (1 + math.e)
    share = (routing.expert_N == 1).float().mean().item()
    assert share == pytest.approx(second, abs=SIGMAS * math.sqrt(second * (1 - second) / 20_000))
    assert (routing.experts_per_token_T == 1).all()
    expected_N = torch.where(routing.expert_N == 1, second, 1 - second)
    torch.testing.assert_close(routing.weight_N, expected_N)
    argmax = build_identity_router("dense_to_sparse", 2, dense_steps=10, hard_phase="argmax")
    for other in (route_logits(router, logits_TE, step=10), route_logits(argmax, logits_TE, training=True, step=10)):
        assert (other.expert_N == 0).all()
        torch.testing.assert_close(other.weight_N, torch.full((20_000,), 1 - second))


def test_dense_phase_weights_can_be_the_softmax() -> None:
    relaxed, softmax = (
        route_logits(
            build_identity_router("dense_to_sparse", 4, threshold=0.1, weights=weights), P_E.log(), training=True
        )
        for weights in ("relaxed", "softmax")
    )
    assert expert_weights(softmax).keys() == expert_weights(relaxed).keys()
    assert expert_weights(softmax) == pytest.approx(
        {expert: P_E[0, expert].item() for expert in expert_weights(relaxed)}
    )
    assert expert_weights(softmax) != pytest.approx(expert_weights(relaxed))


@pytest.mark.parametrize(
    ("name", "num_experts", "options", "message"),
    [
        ("remoe", 2, {"top_k": 2}, r"router\.top_k must be below layout\.num_experts=2, got 2"),
        ("remoe", 8, {"alpha": 0.9}, r"router\.alpha must be from 1"),
        ("gumbel", 8, {"temperature": 0.1}, r"router\.temperature must be at least 0\.5, the final, got 0\.1"),
        ("gumbel", 8, {"final_temperature": 0.0}, r"router\.final_temperature must be greater than 0"),
        ("dense_to_sparse", 8, {"threshold": 1.0}, r"router\.threshold must be at least 0 and below 1"),
        ("sparse_mixer", 8, {"tolerance": -1.0}, r"router\.tolerance must be at least 0"),
        ("quantile_balancing", 8, {"momentum": 1.0}, r"router\.momentum must be at least 0 and below 1"),
        ("quantile_balancing", 8, {"top_k": 1, "renormalise": True}, r"router\.top_k=1 .*always 1"),
    ],
)
def test_options_out_of_range_are_refused(name: str, num_experts: int, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        build_identity_router(name, num_experts, **options)
