"""Rerouting and identity overflow, against plain loops, on arbitrary routings."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.identity_gates import build_identity_router, route_logits
from support.routing_strategies import crowded_routings, make_generator, rectangles, routings

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity, order_by_precedence
from moebench.experts.overflow import apply_capacity, identity_overflow
from moebench.routing.values import LayerRecord, Routing

any_routing = st.one_of(crowded_routings, routings(holes=True, scored=True), rectangles(holes=True, scored=True))
orders = st.sampled_from(["router", "position", "score", "priority", "random"])


def limit(routing: Routing, slots: int, order: str, overflow: str = "reroute") -> Routing:
    return apply_capacity(routing, slots, Capacity(drop_order=order, overflow=overflow), make_generator())


def slow_reroute(routing: Routing, slots: int, queue: list[int]) -> dict[int, int]:
    """Return which expert computes which assignment, by loops; assignments that no expert computes are missing."""
    token, expert, scores = routing.token_N.tolist(), routing.expert_N.tolist(), routing.scores_TE.tolist()
    load: Counter[int] = Counter()
    where: dict[int, int] = {}

    def request(n: int, wanted: int) -> None:
        if load[wanted] < slots:
            where[n] = wanted
            load[wanted] += 1

    for n in (n for n in queue if routing.counted_N[n]):
        request(n, expert[n])
    for turn in range(3):
        waiting = [n for n in queue if routing.counted_N[n] and n not in where]
        first_of = {token[n]: n for n in reversed(waiting)}
        for n in (n for n in waiting if first_of[token[n]] == n):
            others = others_of(token, expert, scores, token[n])
            if turn < len(others):
                request(n, others[turn])
    return where


def others_of(token: list[int], expert: list[int], scores: list[list[float]], t: int) -> list[int]:
    """Return the experts that are not in a token's list, from the highest score to the lowest."""
    listed = {e for other, e in zip(token, expert, strict=True) if other == t}
    return sorted(set(range(len(scores[t]))) - listed, key=lambda e: (-scores[t][e], e))


@given(any_routing, st.integers(0, 4), orders)
def test_reroute_is_the_slow_reroute(routing: Routing, slots: int, order: str) -> None:
    queue = order_by_precedence(routing, order, make_generator()).tolist()
    expected = slow_reroute(routing, slots, queue)
    kept = limit(routing, slots, order)
    assert {n: int(kept.expert_N[n]) for n in range(len(queue)) if kept.counted_N[n]} == expected
    assert kept.top_k == routing.top_k
    assert torch.equal(kept.token_N, routing.token_N)


@given(any_routing, st.integers(0, 4), orders)
def test_a_rerouted_routing_is_within_capacity_and_complete(routing: Routing, slots: int, order: str) -> None:
    dropping, kept = limit(routing, slots, order, "drop"), limit(routing, slots, order)
    record = LayerRecord(routing=routing, kept=kept)
    assert (kept.load_E <= slots).all()
    assert (kept.counted_N | ~dropping.counted_N).all(), "what had a slot keeps it"
    assert torch.equal(kept.expert_N[dropping.counted_N], routing.expert_N[dropping.counted_N])
    assert int(kept.load_E.sum()) + record.num_dropped == int(routing.load_E.sum())
    assert record.num_rerouted == int(kept.load_E.sum() - dropping.load_E.sum())
    assert record.num_unserved == int((kept.experts_per_token_T == 0).sum())
    pairs = list(zip(kept.token_N.tolist(), kept.expert_N.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs), "no pair occurs twice"
    # An assignment without an expert has requested its token's three best other experts: none has a free slot.
    lists = routing.token_N.tolist(), routing.expert_N.tolist(), routing.scores_TE.tolist()
    for n in torch.nonzero(routing.counted_N & ~kept.counted_N).flatten().tolist():
        token = int(routing.token_N[n])
        for expert in others_of(*lists, token)[:3]:
            assert (token, expert) in pairs or kept.load_E[expert] == slots


@given(any_routing, st.integers(0, 4), orders)
def test_weights_shrink_as_the_scores_do(routing: Routing, slots: int, order: str) -> None:
    kept = limit(routing, slots, order)
    for n in range(routing.token_N.numel()):
        token, old, new = int(routing.token_N[n]), int(routing.expert_N[n]), int(kept.expert_N[n])
        before, after = float(routing.scores_TE[token, old]), float(routing.scores_TE[token, new])
        ratio = 1.0 if old == new or after >= before else after / before
        expected = float(routing.weight_N[n]) * ratio if kept.counted_N[n] else 0.0
        assert float(kept.weight_N[n]) == pytest.approx(expected)


def test_reroute_by_hand() -> None:
    # Three tokens want expert 0, which has one slot. Token 1 takes its second best, expert 1; token 2 wants that
    # too and is sent on to expert 2, its third.
    scores_TE = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.7, 0.2, 0.1]], requires_grad=True)
    weight_TK, expert_TK = scores_TE.max(-1, keepdim=True)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=3, scores_TE=scores_TE)
    kept = limit(routing, 1, "position")
    assert kept.expert_N.tolist() == [0, 1, 2]
    assert kept.weight_N.tolist() == pytest.approx([0.6, 0.4, 0.1])  # Switch: the weight is the score of who computes
    gradient_TE = torch.autograd.grad(kept.weight_N.sum(), scores_TE)[0]
    assert gradient_TE.flatten().tolist() == pytest.approx([1, 0, 0, 0, 1, 0, 0, 0, 1])
    record = LayerRecord(routing=routing, kept=kept)
    assert (record.num_dropped, record.num_rerouted, record.num_unserved) == (0, 2, 0)


def test_a_round_requests_one_expert_whether_or_not_it_has_a_free_slot() -> None:
    # One slot. Tokens 0 and 1 have their experts, 2 and 3 wait for expert 0. Round 1: token 2 requests expert 1, which
    # is full, and token 3 gets expert 2. Round 2: token 2 requests expert 2, now full. Round 3: it gets its fourth.
    probability_TE = torch.tensor(
        [[0.97, 0.01, 0.01, 0.01], [0.01, 0.97, 0.01, 0.01], [0.4, 0.3, 0.2, 0.1], [0.4, 0.1, 0.3, 0.2]]
    )
    routing = route_logits(build_identity_router("switch", 4), probability_TE.log())
    kept = limit(routing, 1, "position")
    assert kept.expert_N.tolist() == [0, 1, 3, 2]
    assert kept.weight_N.tolist() == pytest.approx([0.97, 0.97, 0.1, 0.3])


@pytest.mark.parametrize(("rank", "served"), [(4, True), (5, False)])
def test_a_token_requests_at_most_its_four_best_experts(rank: int, served: bool) -> None:
    # Five experts with one slot. Token 0 has expert 0, which is token 1's first choice, and the tokens behind have its
    # second, third and so on: the first free one is its `rank`-th.
    probability_TE = torch.full((rank, 5), 0.01)
    probability_TE[torch.arange(rank), torch.tensor([0, 0, 1, 2, 3][:rank])] = 0.96
    probability_TE[1] = torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])
    routing = route_logits(build_identity_router("switch", 5), probability_TE.log())
    kept = limit(routing, 1, "position")
    assert kept.counted_N.tolist() == [True, served] + [True] * (rank - 2)
    assert int(kept.expert_N[1]) == (rank - 1 if served else 0)


def test_two_waiting_assignments_of_a_token_make_requests_in_turn() -> None:
    # Both tokens choose experts 0 and 1. Token 1's first waits for expert 2 in round 1, its second for 3 in round 2.
    scores_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(2, -1)
    routing = Routing.from_top_k(torch.tensor([[0, 1], [0, 1]]), scores_TE[:, :2], num_experts=4, scores_TE=scores_TE)
    assert limit(routing, 1, "position").expert_N.tolist() == [0, 1, 2, 3]
    # Three tokens: in round 1 token 1 fills expert 2; in round 2 its second and token 2's first request expert 3.
    scores_TE = scores_TE[:1].expand(3, -1)
    routing = Routing.from_top_k(
        torch.tensor([[0, 1]]).expand(3, -1), scores_TE[:, :2], num_experts=4, scores_TE=scores_TE
    )
    kept = limit(routing, 1, "position")
    assert kept.counted_N.tolist() == [True, True, True, True, False, False]
    assert kept.expert_N.tolist()[:4] == [0, 1, 2, 3]


def test_renormalised_weights_keep_their_normaliser() -> None:
    # Both tokens choose experts 0 and 1 with scores .5 .3, weights 5/8 3/8; one slot each. Token 1 is sent on to
    # experts 2 (.15) and 3 (.05): .15 · (5/8) / .5 = .15 / .8 and .05 / .8.
    scores_TE = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).expand(2, -1)
    weight_TK = torch.tensor([[5 / 8, 3 / 8]]).expand(2, -1)
    routing = Routing.from_top_k(torch.tensor([[0, 1], [0, 1]]), weight_TK, num_experts=4, scores_TE=scores_TE)
    kept = limit(routing, 1, "position")
    assert kept.expert_N.tolist() == [0, 1, 2, 3]
    assert kept.weight_N.tolist() == pytest.approx([0.625, 0.375, 0.15 / 0.8, 0.05 / 0.8])


@pytest.mark.parametrize("score", [0.0, 1e-38, 1e-30])
def test_vanishing_scores_make_no_infinite_weight(score: float) -> None:
    logits_TE = torch.tensor([[1.0, score, score / 2]]).expand(2, -1).clone().requires_grad_()
    expert_TK, weight_TK = torch.tensor([[1], [1]]), torch.full((2, 1), 0.5)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=3, scores_TE=logits_TE * 1)
    blocked = replace(routing, scores_TE=(logits_TE * torch.tensor([0.0, 1.0, 1.0])))
    for each in (routing, blocked):
        kept = limit(each, 1, "position")
        assert torch.isfinite(kept.weight_N).all()
        assert (kept.weight_N <= 0.5).all()
        (gradient_TE,) = torch.autograd.grad(kept.weight_N.sum(), logits_TE, allow_unused=True, retain_graph=True)
        assert gradient_TE is None or torch.isfinite(gradient_TE).all()


def test_reroute_without_scores_names_the_key() -> None:
    routing = Routing.from_top_k(torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1), num_experts=2)
    with pytest.raises(UsageError, match=r"^layout\.overflow: 'reroute' needs scores"):
        limit(routing, 1, "position")


@given(any_routing, st.integers(0, 4), orders)
def test_assignments_passed_on_are_those_without_a_slot(routing: Routing, slots: int, order: str) -> None:
    kept = limit(routing, slots, order, "pass")
    assert torch.equal(kept.counted_N, limit(routing, slots, order, "drop").counted_N)
    x_TD = torch.randn(routing.num_tokens, 3, generator=make_generator())
    expected_TD = torch.zeros_like(x_TD)
    for n in torch.nonzero(routing.counted_N & ~kept.counted_N).flatten().tolist():
        expected_TD[routing.token_N[n]] += routing.weight_N[n] * x_TD[routing.token_N[n]]
    torch.testing.assert_close(identity_overflow(routing, kept)[:, None] * x_TD, expected_TD)
