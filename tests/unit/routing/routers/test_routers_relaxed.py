"""Routers that are drawn, relaxed or steered: numbers by hand, gradients of estimators, states that arrive."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run
from support.identity_gates import build_identity_router, chosen, record_of, route_logits
from torch import Tensor

from moebench.errors import UsageError
from moebench.models.transformer import init_weights
from moebench.routing.router import ROUTERS, Router, RouterBuildContext
from moebench.routing.routers.dselect_k import smooth_step, spelled

SIGMAS = 5
P_E = torch.tensor([[0.4, 0.3, 0.2, 0.1]])


def logits_gradient(router: Router, logits_TE: Tensor, pull_E: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return d(Σ weight · pull of the expert)/d logits in training, and the sum itself for each token."""
    logits_TE = logits_TE.clone().requires_grad_()
    routing = routed(router, logits_TE, training=True, seed=seed)
    value_N = routing.weight_N * pull_E[routing.expert_N]
    (gradient_TE,) = torch.autograd.grad(value_N.sum(), logits_TE)
    return gradient_TE, value_N.detach()


# ReLU routing


def test_relu_by_hand() -> None:
    router = build_identity_router("remoe", 4)
    routing = routed(router, torch.tensor([[2.0, -1.0, 0.5, 0.0], [-1.0, -2.0, -3.0, -4.0]]))
    assert chosen(routing) == {0: 2.0, 2: 0.5}
    assert chosen(routing, 1) == {}, "a token may go nowhere"
    assert routing.load_E.tolist() == [1, 0, 1, 0]
    # f = E n / (k T) = 4 · (1, 0, 1, 0) / (2 · 2) and mean weights (1, 0, 1/4, 0): 1 · 1 + 1 · 1/4 = 1.25.
    assert router.losses(record_of(routing))["sparsity"].item() == pytest.approx(1.25)
    router.growth.fill_(3.0)
    assert router.losses(record_of(routing))["sparsity"].item() == pytest.approx(3.75)


def test_at_even_loads_of_k_the_penalty_is_the_mean_sum_of_weights() -> None:
    table_TE = torch.tensor([[0.1, 0.7, -1, -1], [-1, 0.2, 0.3, -1], [-1, -1, 0.4, 0.9], [0.5, -1, -1, 0.6]])
    router = build_identity_router("remoe", 4)
    loss = router.losses(record_of(routed(router, table_TE)))["sparsity"]
    assert loss.item() == pytest.approx(table_TE.relu().sum().item() / 4)


@given(st.integers(0, 7), st.floats(-1, 1))
def test_output_is_continuous_where_an_expert_joins(expert: int, other: float) -> None:
    # Just below 0 the expert is out, just above it is in with a weight of next to nothing.
    router = build_identity_router("remoe", 8)
    logits_TE = torch.full((2, 8), other)
    logits_TE[:, expert] = torch.tensor([-1e-6, 1e-6])
    routing = routed(router, logits_TE)
    below, above = chosen(routing, 0), chosen(routing, 1)
    assert expert not in below
    assert above.pop(expert) == pytest.approx(0, abs=1e-5)
    assert above == below


@pytest.mark.parametrize(("num_active", "growth"), [(3, 1.2), (2, 1.0), (1, 1 / 1.2), (0, 1 / 1.2)])
def test_the_penalty_is_steered_by_the_number_of_experts(num_active: int, growth: float) -> None:
    layer = Case("remoe", options={"top_k": 2}).layer()
    with torch.no_grad():
        layer.router.gate.weight_ED.fill_(-1.0)
        layer.router.gate.weight_ED[:num_active] = 1.0
    tokens = Tokens.draw(16)
    tokens.x_TD.abs_()
    for _ in range(2):
        layer.after_step([run(layer, tokens, training=True)[1]])
    assert layer.router.growth.item() == pytest.approx(growth**2)


def test_the_penalty_arrives_at_k() -> None:
    # Only the penalty pulls at the gate; from half of all experts it must settle near k = 1.
    layer = Case("remoe", options={"top_k": 1}).layer()
    layer.router.growth.fill_(1e4)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=1.0)
    active = []
    for step in range(400):
        tokens = Tokens.draw(128, seed=step)
        tokens.x_TD[:, 0] = 1  # a constant feature, so that a logit can be pushed down for every token
        routing = route(layer.router, tokens, training=True)
        pull = (routing.scores_TE - routing.logits_TE.exp().clamp(max=2)).mean()  # something that wants experts
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
    assert chosen(routed(router, logits_TE)) == pytest.approx({0: 0.5025}, abs=1e-4)
    routing = routed(router, logits_TE.expand(4000, -1), training=True)
    assert routing.load_E[2] == 0
    assert abs(int(routing.load_E[1]) - 4000 * 0.4975) < SIGMAS * math.sqrt(1000)
    # The best always has its whole p; the other in a quarter of the draws, else a third of it.
    assert (routing.weight_N[routing.expert_N == 0] - 0.5025).abs().max() < 1e-4
    other_N = routing.weight_N[routing.expert_N == 1]
    assert other_N.min().item() == pytest.approx(0.4975 / 3, abs=1e-4)
    assert other_N.max().item() == pytest.approx(0.4975, abs=1e-4)
    share = (other_N > 0.3).float().mean().item()
    assert share == pytest.approx(0.25, abs=SIGMAS * math.sqrt(0.25 * 0.75 / len(other_N)))


@given(st.integers(0, 50), st.integers(1, 3))
def test_the_gradient_of_a_draw_is_that_of_its_probability(seed: int, top_k: int) -> None:
    # δ p_i (1_i - p): rows sum to 0, and nothing reaches experts that could not be drawn.
    router = build_identity_router("sparse_mixer", 5, top_k=top_k, tolerance=0.2)
    logits_TE = 1 + 0.3 * torch.randn(20, 5, generator=torch.Generator().manual_seed(seed))
    gradient_TE, _ = logits_gradient(router, logits_TE, torch.arange(1.0, 6.0), seed)
    torch.testing.assert_close(gradient_TE.sum(-1), torch.zeros(20), rtol=0, atol=1e-5)
    if top_k == 1:
        routing = routed(router, logits_TE, training=True, seed=seed)
        highest_T1 = logits_TE.max(-1, keepdim=True).values
        near_TE = (highest_T1 - logits_TE) / logits_TE.abs().maximum(highest_T1) <= 0.4
        p_TE = logits_TE.masked_fill(~near_TE, -torch.inf).softmax(-1)
        drawn_T1 = routing.expert_N.unsqueeze(-1)
        one_TE = torch.zeros_like(p_TE).scatter(-1, drawn_T1, 1.0)
        expected_TE = (drawn_T1 + 1) * p_TE.gather(-1, drawn_T1) * (one_TE - p_TE)
        torch.testing.assert_close(gradient_TE, expected_TE, rtol=1e-4, atol=1e-6)


def test_without_tolerance_it_is_the_best_expert_with_weight_1() -> None:
    routing = route_logits(build_identity_router("sparse_mixer", 4, top_k=2, tolerance=0.0), P_E.log(), training=True)
    assert chosen(routing) == {0: 1.0, 1: 1.0}


# Gumbel


def test_straight_through_is_1_forward_and_a_softmax_backward() -> None:
    router = build_identity_router("gumbel", 4)
    gradient_TE, value_N = logits_gradient(router, P_E.log().expand(2000, -1), torch.ones(4), seed=0)
    assert (value_N == 1).all()
    torch.testing.assert_close(gradient_TE.sum(-1), torch.zeros(2000), rtol=0, atol=1e-5)
    assert gradient_TE.abs().sum() > 0
    load_E = routed(router, P_E.log().expand(2000, -1), training=True).load_E
    for load, share in zip(load_E.tolist(), P_E[0].tolist(), strict=True):
        assert abs(load - share * 2000) <= SIGMAS * math.sqrt(2000 * share * (1 - share))
    assert chosen(routed(router, P_E.log())) == {0: 1.0}, "no draw in evaluation"


@pytest.mark.parametrize(("step", "temperature"), [(0, 1.0), (1000, math.exp(-0.1)), (100_000, 0.5)])
def test_temperature_of_the_straight_through_gradient(step: int, temperature: float) -> None:
    # Two experts, logits h and 0: d p_0/dh = p_0 p_1 / τ with p = σ((h + noise) / τ); read τ off the draw itself.
    router = build_identity_router("gumbel", 2)
    logits_TE = torch.tensor([[0.3, 0.0]], requires_grad=True)
    routing = routed(router, logits_TE, training=True, step=step)
    (gradient_TE,) = torch.autograd.grad(routing.weight_N.sum(), logits_TE)
    uniform_TE = torch.rand(1, 2, generator=torch.Generator().manual_seed(0))
    noisy_TE = logits_TE.detach() - (-uniform_TE.log()).log()
    p_E = (noisy_TE / temperature).softmax(-1)[0]
    sign = 1 if int(routing.expert_N) == 0 else -1
    assert gradient_TE[0, 0].item() == pytest.approx(sign * float(p_E.prod()) / temperature, rel=1e-4)


# Dense to sparse


def test_dense_to_sparse_narrows() -> None:
    router = build_identity_router("dense_to_sparse", 4, dense_steps=100, threshold=0.05)
    logits_TE = P_E.log().expand(500, -1)
    counts = []
    for step in (0, 50, 99, 100):
        routing = routed(router, logits_TE, training=True, step=step)
        counts.append(int(routing.load_E.sum()) / 500)
        assert routing.experts_per_token_T.min() >= 1
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 3
    assert counts[-1] == 1
    assert chosen(routed(router, P_E.log())) == pytest.approx({0: 0.4}), "evaluation is top-1"


def test_shares_are_of_the_relaxed_draw() -> None:
    router = build_identity_router("dense_to_sparse", 4, threshold=0.0)
    routing = routed(router, P_E.log().expand(300, -1), training=True)
    torch.testing.assert_close(routing.weight_N.view(300, 4).sum(-1), torch.ones(300))
    uniform_TE = torch.rand(300, 4, generator=torch.Generator().manual_seed(0))
    expected_TE = ((P_E.log() - (-uniform_TE.log()).log()) / 2).softmax(-1)
    torch.testing.assert_close(routing.weight_N.view(300, 4), expected_TE, rtol=1e-4, atol=1e-6)


def test_the_hard_phase_of_dense_to_sparse_draws_in_training() -> None:
    # Logits (1, 0): expert 1 has the probability 1 / (1 + e) = .2689, and that is its weight too when it is drawn.
    logits_TE = torch.tensor([[1.0, 0.0]]).expand(20_000, -1)
    router = build_identity_router("dense_to_sparse", 2, dense_steps=10)
    routing = routed(router, logits_TE, training=True, step=10)
    second = 1 / (1 + math.e)
    share = (routing.expert_N == 1).float().mean().item()
    assert share == pytest.approx(second, abs=SIGMAS * math.sqrt(second * (1 - second) / 20_000))
    assert (routing.experts_per_token_T == 1).all()
    expected_N = torch.where(routing.expert_N == 1, second, 1 - second)
    torch.testing.assert_close(routing.weight_N, expected_N)
    argmax = build_identity_router("dense_to_sparse", 2, dense_steps=10, hard_phase="argmax")
    for other in (routed(router, logits_TE, step=10), routed(argmax, logits_TE, training=True, step=10)):
        assert (other.expert_N == 0).all()
        torch.testing.assert_close(other.weight_N, torch.full((20_000,), 1 - second))


def test_weights_of_the_dense_phase_can_be_those_of_the_softmax() -> None:
    relaxed, softmax = (
        route_logits(
            build_identity_router("dense_to_sparse", 4, threshold=0.1, weights=weights), P_E.log(), training=True
        )
        for weights in ("relaxed", "softmax")
    )
    assert chosen(softmax).keys() == chosen(relaxed).keys()
    assert chosen(softmax) == pytest.approx({expert: P_E[0, expert].item() for expert in chosen(relaxed)})
    assert chosen(softmax) != pytest.approx(chosen(relaxed))


# DSelect-k


def test_the_smooth_step_by_hand() -> None:
    # S(.25) = -2/64 + 3/8 + 1/2 = .84375, and S(-z) = 1 - S(z); the slope at the ends is 0.
    z = torch.tensor([-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0], requires_grad=True)
    assert smooth_step(z, 1.0).tolist() == [0.0, 0.0, 0.15625, 0.5, 0.84375, 1.0, 1.0]
    assert smooth_step(4 * z, 4.0).tolist() == smooth_step(z, 1.0).tolist()
    (slope,) = torch.autograd.grad(smooth_step(z, 1.0).sum(), z)
    assert slope.tolist() == pytest.approx([0, 0, 1.125, 1.5, 1.125, 0, 0])


def test_bits_spell_the_number_of_an_expert() -> None:
    # Bits (lowest first) 1, 0, 1 are expert 5; a half in the middle bit shares between 5 and 7.
    bits_TKb = torch.tensor([[[1.0, 0.0, 1.0], [1.0, 0.5, 1.0]]])
    named_TKE = spelled(bits_TKb, 8)
    assert named_TKE[0, 0].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert named_TKE[0, 1].tolist() == [0, 0, 0, 0, 0, 0.5, 0, 0.5]


@given(st.integers(1, 3), st.integers(2, 9), st.integers(0, 99))
def test_a_selector_gives_away_1_or_loses_it_on_nobody(top_k: int, num_experts: int, seed: int) -> None:
    bits = torch.rand(5, top_k, (num_experts - 1).bit_length(), generator=torch.Generator().manual_seed(seed))
    sums_TK = spelled(bits, num_experts).sum(-1)
    assert (sums_TK <= 1 + 1e-5).all()
    if num_experts & (num_experts - 1) == 0:
        torch.testing.assert_close(sums_TK, torch.ones_like(sums_TK))


def test_settled_bits_are_k_experts_and_open_ones_all_experts() -> None:
    router = Case("dselect_k").router()
    with torch.no_grad():
        router.bit_gate.weight_ED.mul_(1e6)
    settled = route(router, Tokens.draw(64), training=True)
    assert settled.experts_per_token_T.max() <= 2
    assert router.losses(record_of(settled))["selector_entropy"].item() == pytest.approx(0, abs=1e-4)
    fresh = route(Case("dselect_k").fresh_router(), Tokens.draw(64), training=True)
    assert (fresh.experts_per_token_T == 8).all()
    # Each of two selectors is undecided among 8: 2 ln 8.
    entropy = router.losses(record_of(fresh))["selector_entropy"].item()
    assert entropy == pytest.approx(2 * math.log(8), rel=1e-2)


def test_what_is_lost_on_nobody_pushes_with_a_coefficient_of_its_own() -> None:
    # S(.3) = -2 · .027 + .45 + .5 = .896 for both bits: expert 0 has .104², 1 and 2 have .896 · .104, together .197;
    # 1 / .197 - 1 = 4.07. The source's gradient of 1 / Σ with respect to each weight of the first feature is 22.12.
    router_class = ROUTERS.get("dselect_k").item
    router = router_class(router_class.Config(top_k=1), RouterBuildContext(d_model=2, num_experts=3))
    with torch.no_grad():
        router.bit_gate.weight_ED.copy_(torch.tensor([[0.3, 0.0], [0.3, 0.0]]))
    routing = router(torch.tensor([[1.0, 0.0]]), Tokens.draw(1).context(training=True))
    losses = router.losses(record_of(routing))
    assert losses["lost_weight"].item() == pytest.approx(1 / 0.197184 - 1, rel=1e-4)
    assert losses["selector_entropy"].item() == pytest.approx(
        -sum(p * math.log(p) for p in (0.104**2, 0.896 * 0.104, 0.896 * 0.104)), rel=1e-4
    )
    total = sum(router.config.losses[name] * loss for name, loss in losses.items())
    (gradient_ED,) = torch.autograd.grad(total, router.bit_gate.weight_ED)
    assert gradient_ED[:, 0].tolist() == pytest.approx([22.1226, 22.1226], rel=1e-4)
    assert not gradient_ED[:, 1].any()


def test_where_every_number_names_an_expert_nothing_is_lost() -> None:
    for num_experts, lost in ((8, False), (9, True)):
        router = Case("dselect_k", num_experts).router()
        loss = router.losses(record_of(route(router, Tokens.draw(16), training=True)))["lost_weight"]
        assert bool(loss > 0.1) is lost
        assert bool(loss == 0) is not lost


def test_the_spread_of_the_first_bits_is_the_sources() -> None:
    # Weights even between -γ/100 and γ/100 have a deviation of γ/173: at d = 64 of .046 for tokens of unit variance.
    router_class = ROUTERS.get("dselect_k").item
    router = router_class(router_class.Config(gamma=2.0), RouterBuildContext(d_model=64, num_experts=16))
    init_weights(router, 0)
    x_TD = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    assert router.bit_gate(x_TD).std().item() == pytest.approx(2 * 0.0462, rel=0.1)


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
        ("dselect_k", 1, {"top_k": 1}, r"layout\.num_experts must be at least 2"),
        ("dselect_k", 8, {"gamma": 0.0}, r"router\.gamma must be greater than 0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, num_experts: int, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        build_identity_router(name, num_experts, **options)
