"""Balanced assignment: BASE and S-BASE, by hand and against the optimum."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Case, Tokens, route
from torch import Tensor

from moebench.errors import UsageError
from moebench.models.transformer import init_weights
from moebench.routing.assignment import (
    cancel_positive_cycles,
    compute_entropic_prices,
    find_positive_cycle,
    solve_balanced_assignment,
    solve_exactly,
)
from moebench.routing.ranking import TOLERANCE
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.routers.sinkhorn import compute_column_scale

SOLVERS = ("auction", "exact", "sinkhorn")
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def value(affinity_TE: Tensor, expert_T: Tensor) -> float:
    return float(affinity_TE.detach().gather(1, expert_T.unsqueeze(1)).double().sum())


def merging_cost(affinity_TE: Tensor) -> float:
    """Return how much merging near ties may cost: a few times the tolerance for each token."""
    return 4 * len(affinity_TE) * TOLERANCE * float(affinity_TE.max() - affinity_TE.min()) + 1e-5


def sample_affinities(num_tokens: int, num_experts: int, seed: int, kind: str) -> Tensor:
    """Draw affinities: iid, with popular experts, or of low rank as a gate's."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "low rank":
        x_TD, w_DE = torch.randn(num_tokens, 4, generator=generator), torch.randn(4, num_experts, generator=generator)
        return x_TD @ w_DE
    popular_E = torch.linspace(0, 2, num_experts) if kind == "popular" else torch.zeros(num_experts)
    return torch.randn(num_tokens, num_experts, generator=generator) + popular_E


@every_solver
def test_assignment_by_hand(solver) -> None:
    # All prefer expert 0, which has two slots. Giving it to tokens 1 and 3 loses 0.5 of token 0 and 1 of token 2:
    # 3 + 3 + 1.5 + 1 = 8.5. Other pairs in expert 0: {0,1} 6, {0,2} 4, {0,3} 6, {1,2} 3+2+1.5+0 = 6.5, {2,3} 6.5.
    affinity_TE = torch.tensor([[2.0, 1.5], [3.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
    expert_T = solve_balanced_assignment(affinity_TE, solver)
    assert expert_T.tolist() == [1, 0, 1, 0]
    assert value(affinity_TE, expert_T) == 8.5


@every_solver
def test_optimum_differs_from_greedy(solver) -> None:
    # In order of affinity token 0 would take expert 0 (10) and leave token 1 with 0: 10. The optimum is 9 + 9.
    assert solve_balanced_assignment(torch.tensor([[10.0, 9.0], [9.0, 0.0]]), solver).tolist() == [1, 0]


@every_solver
@settings(max_examples=15)
@given(st.integers(1, 7), st.integers(1, 3), st.integers(0, 99))
def test_optimum_of_all_assignments_by_enumeration(solver, num_tokens: int, num_experts: int, seed: int) -> None:
    affinity_TE = sample_affinities(num_tokens, num_experts, seed, "iid")
    capacity = -(-num_tokens // num_experts)
    expert_T = solve_balanced_assignment(affinity_TE, solver)
    assert torch.bincount(expert_T, minlength=num_experts).max() <= capacity
    allowed = itertools.product(range(num_experts), repeat=num_tokens)
    best = max(
        sum(float(affinity_TE[t, e]) for t, e in enumerate(experts))
        for experts in allowed
        if max(experts.count(e) for e in range(num_experts)) <= capacity
    )
    assert best - merging_cost(affinity_TE) <= value(affinity_TE, expert_T) <= best + 1e-5


@pytest.mark.parametrize("kind", ["iid", "popular", "low rank"])
@pytest.mark.parametrize("shape", [(256, 8), (250, 8), (512, 32)], ids=str)
def test_every_solver_finds_the_optimum(kind: str, shape: tuple[int, int]) -> None:
    affinity_TE = sample_affinities(*shape, 0, kind)
    best = value(affinity_TE, solve_exactly(affinity_TE))
    for solver in SOLVERS:
        expert_T = solve_balanced_assignment(affinity_TE, solver)
        assert torch.bincount(expert_T, minlength=shape[1]).max() <= -(-shape[0] // shape[1])
        assert best - merging_cost(affinity_TE) <= value(affinity_TE, expert_T) <= best + 1e-5


@pytest.mark.parametrize("seed", range(5))
def test_solvers_agree_under_rounding_noise(seed: int) -> None:
    # A quarter of the tokens repeat others up to noise, as equal words at equal positions do.
    generator = torch.Generator().manual_seed(seed)
    affinity_TE = sample_affinities(128, 8, seed, "low rank") / 8
    affinity_TE = affinity_TE[torch.cat([torch.arange(96), torch.randint(96, (32,), generator=generator)])]
    expert_T = solve_balanced_assignment(affinity_TE, "exact")
    for solver in SOLVERS:
        noisy_TE = affinity_TE + 1e-7 * torch.randn(affinity_TE.shape, generator=generator)
        assert torch.equal(solve_balanced_assignment(noisy_TE, solver), expert_T)


@every_solver
def test_equal_tokens_are_assigned_in_order(solver) -> None:
    # Six equal tokens and two that prefer expert 1: the six fill expert 0, then what is left of expert 1, in order.
    affinity_TE = torch.tensor([[0.5, 0.5]] * 3 + [[0.0, 1.0]] * 2 + [[0.5, 0.5]] * 3)
    noise_TE = 1e-7 * torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
    for each_TE in (affinity_TE, affinity_TE + noise_TE):
        assert solve_balanced_assignment(each_TE, solver).tolist() == [0, 0, 0, 1, 1, 0, 1, 1]


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(0, 10_000))
def test_positive_cycle_is_found_if_one_exists(num_nodes: int, seed: int) -> None:
    gain_EE = torch.randint(-6, 5, (num_nodes, num_nodes), generator=torch.Generator().manual_seed(seed)).double()

    def total(cycle) -> float:
        return sum(float(gain_EE[e, f]) for e, f in zip(cycle, [*cycle[1:], cycle[0]], strict=True))

    cycles = [c for length in range(2, num_nodes + 1) for c in itertools.permutations(range(num_nodes), length)]
    cycle = find_positive_cycle(gain_EE)
    assert len(set(cycle)) == len(cycle)
    assert total(cycle) > 0 if any(total(other) > 0 for other in cycles) else cycle == []


def test_cancelling_cycles_reaches_the_optimum_from_any_assignment() -> None:
    affinity_TE = sample_affinities(60, 5, 0, "popular").double()
    best = value(affinity_TE, solve_exactly(affinity_TE))
    for seed in range(5):
        start_T = torch.arange(60)[torch.randperm(60, generator=torch.Generator().manual_seed(seed))] % 5
        expert_T = cancel_positive_cycles(affinity_TE, start_T)
        assert expert_T.bincount().tolist() == [12] * 5
        assert value(affinity_TE, expert_T) == pytest.approx(best, abs=1e-6)


@every_solver
def test_equal_and_huge_affinities(solver) -> None:
    for affinity_TE in (torch.zeros(12, 4), 1e30 * sample_affinities(12, 4, 0, "iid"), torch.full((12, 4), -3.0)):
        assert solve_balanced_assignment(affinity_TE, solver).bincount(minlength=4).tolist() == [3] * 4
    assert solve_balanced_assignment(torch.zeros(0, 4), solver).shape == (0,)


def test_prices_equal_constant_affinities() -> None:
    # Affinities that are a constant of each expert: the prices are these constants.
    price_E = compute_entropic_prices(torch.tensor([[0.0, 0.3, 0.1]]).expand(6, 3), 0.1, 30)
    torch.testing.assert_close(price_E, torch.tensor([0.0, 0.3, 0.1]))


@every_solver
def test_base_is_balanced_in_training_and_greedy_in_evaluation(solver) -> None:
    router, tokens = Case("base", options={"solver": solver}).router(), Tokens.draw(64)
    training, evaluating = (route(router, tokens, training=mode) for mode in (True, False))
    assert training.load_E.tolist() == [8] * 8
    assert torch.equal(evaluating.expert_N, evaluating.logits_TE.argmax(-1))
    assert evaluating.load_E.max() > 8
    for routing in (training, evaluating):
        torch.testing.assert_close(
            routing.weight_N, routing.logits_TE.sigmoid()[torch.arange(64), routing.expert_N], rtol=0, atol=0
        )
    assert value(training.logits_TE, training.expert_N) <= value(evaluating.logits_TE, evaluating.expert_N)


def test_base_is_equivariant_to_the_order_of_tokens() -> None:
    router, tokens = Case("base", options={"solver": "exact"}).router(), Tokens.draw(64)
    order_T = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    ours, theirs = route(router, tokens, training=True), route(router, tokens.take(order_T), training=True)
    assert torch.equal(theirs.expert_N, ours.expert_N[order_T])


def test_sinkhorn_by_hand() -> None:
    # exp(h) = [[1, 1], [1, 4]] scaled to rows of 1 and columns of 1: symmetric, so the plan is [[p, 1-p], [1-p, p]]
    # with the same cross ratio 4 = p² / (1-p)², p = 2/3. Row 0 gives v_0/v_1 = p / (1-p) = 2.
    logits_TE = torch.tensor([[1.0, 1.0], [1.0, 4.0]]).log()
    scale_E = compute_column_scale(logits_TE, 60)
    assert float(scale_E[0] / scale_E[1]) == pytest.approx(2, rel=1e-4)
    # The logits tie in row 0; the plan assigns it to the expert that row 1 does not take.
    assert (logits_TE + scale_E.log()).argmax(-1).tolist() == [0, 1]


@settings(max_examples=20)
@given(st.integers(2, 40), st.integers(1, 6), st.integers(0, 99))
def test_sinkhorn_marginals_and_invariance(num_tokens: int, num_experts: int, seed: int) -> None:
    logits_TE = sample_affinities(num_tokens, num_experts, seed, "popular")
    scale_E = compute_column_scale(logits_TE, 200)
    plan_TE = (logits_TE + scale_E.log()).softmax(-1)  # rows sum to 1
    torch.testing.assert_close(
        plan_TE.sum(0), torch.full((num_experts,), num_tokens / num_experts), rtol=1e-3, atol=1e-3
    )
    # Adding a constant per token and one per expert changes nothing: the scales absorb them.
    generator = torch.Generator().manual_seed(seed)
    shift_T1, shift_E = torch.randn(num_tokens, 1, generator=generator), torch.randn(num_experts, generator=generator)
    shifted_TE = logits_TE + shift_T1 + shift_E
    same_TE = (shifted_TE + compute_column_scale(shifted_TE, 200).log()).softmax(-1)
    torch.testing.assert_close(same_TE, plan_TE, rtol=1e-2, atol=1e-3)


def test_sinkhorn_evens_loads_and_is_the_assignment_at_low_temperature() -> None:
    router, tokens = Case("sinkhorn").router(), Tokens.draw(512)
    plain, planned = (route(router, tokens, training=mode).load_E.double() for mode in (False, True))
    assert planned.max() / 64 - 1 < 0.35 * (plain.max() / 64 - 1)
    # At a low temperature the plan is the balanced assignment (Sinkhorn with beta to infinity is BASE).
    affinity_TE = sample_affinities(24, 4, 0, "popular")
    cold_TE = 15 * affinity_TE
    chosen_T = (cold_TE + compute_column_scale(cold_TE, 3000).log()).argmax(-1)
    assert torch.equal(chosen_T, solve_balanced_assignment(affinity_TE, "exact"))


def test_sinkhorn_weights_come_from_the_logits() -> None:
    tokens = Tokens.draw(32)
    for top_k in (1, 3):
        routing = route(Case("sinkhorn", options={"top_k": top_k}).router(), tokens, training=True)
        score_TE = routing.logits_TE.sigmoid() if top_k == 1 else routing.logits_TE.softmax(-1)
        torch.testing.assert_close(routing.weight_N, score_TE[routing.token_N, routing.expert_N], rtol=0, atol=0)
        assert math.isclose(float(routing.load_E.sum()), 32 * top_k)


def test_zero_iterations_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^router\.iterations must be at least 1, got 0$"):
        Case("sinkhorn").router_class.check(Case("sinkhorn", options={"iterations": 0}).config, 8)


def test_gate_of_base_has_the_papers_row_length() -> None:
    # Orthogonal with a gain of 0.1: rows of length 0.1. Truncation without correction would give .088.
    router_class = ROUTERS.get("base").item
    router = router_class(router_class.Config(), RouterBuildContext(d_model=512, num_experts=64))
    init_weights(router, 0)
    assert router.gate.weight_ED.square().sum(-1).mean().sqrt().item() == pytest.approx(0.1, rel=0.01)
