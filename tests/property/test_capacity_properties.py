"""Capacity, dispatch and combine on arbitrary routings."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.identity_gates import build_identity_router, route_logits
from support.routing_strategies import make_generator, routings

from moebench.experts.capacity import Capacity, DropOrder, keep_first_slots, order_by_precedence
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.routing.values import Routing

pytestmark = pytest.mark.usefixtures("kernels_for_few_rows")
orders = st.sampled_from(["router", "position", "score", "priority", "random"])


def kept_within(routing: Routing, slots: int, order: DropOrder, generator: torch.Generator) -> torch.Tensor:
    """Return which assignments each expert keeps in the order that the layout names."""
    return keep_first_slots(routing, slots, order_by_precedence(routing, order, generator))


def queue(routing: Routing, order: str) -> list[int]:
    """Return the assignments from the first to be kept to the last, by plain sorting."""
    tokens, weights = routing.token_N.tolist(), routing.weight_N.tolist()
    if order == "router" and routing.priority_N is not None:
        priority = routing.priority_N.tolist()
        return sorted(range(len(tokens)), key=lambda n: (-priority[n], n))
    if order == "score":
        return sorted(range(len(tokens)), key=lambda n: (-weights[n], n))
    if order == "priority":
        choices_of = {t: sorted((-w, n) for n, w in enumerate(weights) if tokens[n] == t) for t in set(tokens)}
        choice = {n: place for pairs in choices_of.values() for place, (_, n) in enumerate(pairs)}
        return sorted(range(len(tokens)), key=lambda n: (choice[n], choices_of[tokens[n]][0][0], tokens[n]))
    if order == "random":
        return torch.randperm(len(tokens), generator=make_generator()).tolist()
    return sorted(range(len(tokens)), key=lambda n: (tokens[n], n))


@given(routings(), st.integers(0, 6), orders)
def test_each_expert_keeps_the_first_of_its_queue(routing: Routing, slots: int, order: str) -> None:
    kept_N = kept_within(routing, slots, order, make_generator()).tolist()
    free = Counter(dict.fromkeys(range(routing.num_experts), slots))
    for assignment in queue(routing, order):
        expert = int(routing.expert_N[assignment])
        assert kept_N[assignment] is (free[expert] > 0)
        free[expert] -= 1


@given(routings(), st.integers(0, 6), orders)
def test_kept_and_dropped_add_up(routing: Routing, slots: int, order: str) -> None:
    kept = routing.keep(kept_within(routing, slots, order, make_generator()))
    assert torch.equal(kept.load_E, routing.load_E.clamp(max=slots))
    assert kept.experts_per_token_T.sum() == kept.load_E.sum() == kept.compact().token_N.numel()


@given(routings(), st.integers(0, 5), orders)
def test_more_slots_keep_what_fewer_kept(routing: Routing, slots: int, order: str) -> None:
    fewer_N = kept_within(routing, slots, order, make_generator())
    more_N = kept_within(routing, slots + 1, order, make_generator())
    assert (more_N | ~fewer_N).all()


rules = st.sampled_from(["megatron", "vmoe", "switch", "deepspeed"])
sizes = st.tuples(st.integers(0, 500), st.integers(1, 8), st.integers(1, 64))


def slots_of(rule: str, factor: float | None, num_tokens: int, top_k: int, num_experts: int) -> int | None:
    """Return C in training; evaluation has its own factor, which is None here."""
    capacity = Capacity(train=factor, rule=rule)
    sizes = {"num_tokens": num_tokens, "experts_per_token": top_k, "num_experts": num_experts}
    assert capacity.slots(training=False, **sizes) is None
    assert Capacity(eval=factor, rule=rule).slots(training=False, **sizes) == capacity.slots(training=True, **sizes)
    return capacity.slots(training=True, **sizes)


@given(rules, sizes, st.floats(1e-3, 64), st.floats(1, 4))
def test_slots_grow_with_the_factor_and_end_at_the_tokens(rule, sizes, factor: float, more: float) -> None:
    fewer, many = slots_of(rule, factor, *sizes), slots_of(rule, factor * more, *sizes)
    assert fewer is not None
    assert many is not None
    assert 0 <= fewer <= many <= sizes[0]
    assert slots_of(rule, 1e9, *sizes) == sizes[0]
    assert slots_of(rule, math.inf, *sizes) is slots_of(rule, None, *sizes) is None


@given(sizes, st.floats(1e-3, 64))
def test_rules_by_their_relations(sizes, factor: float) -> None:
    num_tokens, top_k, num_experts = sizes
    megatron, vmoe, switch, deepspeed = (
        slots_of(rule, factor, *sizes) for rule in ("megatron", "vmoe", "switch", "deepspeed")
    )
    exact = factor * num_tokens * top_k / num_experts
    assert min(exact, num_tokens) - 1e-6 <= megatron <= math.ceil(exact)
    assert megatron <= vmoe < megatron + 4
    assert vmoe % 4 == 0 or vmoe == num_tokens
    assert deepspeed == min(max(megatron, 4), num_tokens)
    assert min(exact / top_k - 1, num_tokens) <= switch <= max(exact / top_k + 1e-6, 4)
    assert switch >= min(4, num_tokens)


@pytest.mark.parametrize(
    ("rule", "factor", "num_tokens", "top_k", "num_experts", "slots"),
    [
        ("megatron", 1.0, 16, 1, 4, 4),  # even
        ("megatron", 1.0, 17, 1, 4, 5),  # rounded up
        ("megatron", 1.25, 16, 2, 4, 10),
        ("megatron", 1.1, 100, 1, 10, 11),  # 1.1 · 100 / 10 is 11.000000000000002 in fp64: still 11
        ("megatron", 0.25, 1, 1, 8, 1),  # never rounded down to "no limit" or to nothing
        ("megatron", 1.0, 0, 1, 8, 0),
        ("megatron", 4.0, 16, 2, 4, 16),  # 32, but there are 16 tokens
        ("megatron", math.inf, 16, 1, 4, None),
        ("megatron", None, 16, 1, 4, None),
        ("vmoe", 1.0, 16, 1, 4, 4),
        ("vmoe", 1.0, 17, 1, 4, 8),  # 5, up to a multiple of 4
        ("vmoe", 1.25, 16, 2, 4, 12),  # 10
        ("vmoe", 0.25, 1, 1, 8, 1),  # 4, but there is one token
        ("switch", 1.25, 64, 1, 8, 10),
        ("switch", 1.25, 64, 2, 8, 10),  # without k
        ("switch", 1.0, 63, 1, 8, 7),  # 7.875 rounded down
        ("switch", 2.3, 100, 1, 10, 23),  # 22.999999999999996 in fp64: still 23
        ("switch", 1.0, 16, 1, 8, 4),  # 2, at least 4
        ("switch", 1.0, 3, 1, 8, 3),  # 4, but there are three tokens
        ("deepspeed", 1.25, 64, 1, 8, 10),
        ("deepspeed", 1.25, 64, 2, 8, 20),
        ("deepspeed", 1.0, 63, 1, 8, 8),  # rounded up
        ("deepspeed", 1.0, 16, 1, 8, 4),  # 2, at least 4
        ("deepspeed", 1.0, 0, 1, 8, 0),
    ],
)
def test_slots_by_hand(rule, factor, num_tokens: int, top_k: int, num_experts: int, slots: int | None) -> None:
    assert slots_of(rule, factor, num_tokens, top_k, num_experts) == slots


def test_each_order_by_hand() -> None:
    # Four tokens want expert 0, which has two slots; weights .2 .9 .9 .4, priorities 1 0 3 3.
    routing = Routing(
        token_N=torch.arange(4),
        expert_N=torch.zeros(4, dtype=torch.int64),
        weight_N=torch.tensor([0.2, 0.9, 0.9, 0.4]),
        num_tokens=4,
        num_experts=1,
        priority_N=torch.tensor([1, 0, 3, 3]),
    )
    kept = {
        order: kept_within(routing, 2, order, make_generator()).tolist() for order in ("position", "score", "router")
    }
    assert kept == {
        "position": [True, True, False, False],
        "score": [False, True, True, False],
        "router": [False, False, True, True],
    }
    by_position = kept_within(replace(routing, priority_N=None), 2, "router", make_generator())
    assert by_position.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "order", "taken"),
    [
        # Two tokens, one slot; experts by token, first choice first: 1 0 and 0 2.
        ("olmoe", "score", [(0, 1), (0, 0), (1, 2)]),  # .45 is more than .40, though a second choice
        ("olmoe", "priority", [(0, 1), (1, 0), (1, 2)]),
        ("v_moe", "router", [(0, 1), (1, 0), (1, 2)]),
    ],
)
def test_score_ranks_all_assignments_and_priority_first_choices_first(name: str, order: str, taken) -> None:
    probability_TE = torch.tensor([[0.45, 0.5, 0.05], [0.40, 0.25, 0.35]])
    routing = route_logits(build_identity_router(name, 3, top_k=2), probability_TE.log())
    kept = routing.keep(kept_within(routing, 1, order, make_generator())).compact()
    assert list(zip(kept.token_N.tolist(), kept.expert_N.tolist(), strict=True)) == taken


def test_priority_ranks_tokens_by_their_best_weight_in_every_round() -> None:
    # Token 0 is surer (.6) than token 1 (.5), so its second choice (.3) comes before token 1's (.4); then third ones.
    weight_TK = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    routing = Routing.from_top_k(torch.tensor([[0, 1, 2], [3, 1, 2]]), weight_TK, num_experts=4)
    assert order_by_precedence(routing, "priority", make_generator()).tolist() == [0, 3, 1, 4, 2, 5]
    assert order_by_precedence(routing, "score", make_generator()).tolist() == [0, 3, 4, 1, 2, 5]


@given(routings(), st.integers(1, 3), st.integers(0, 1000))
def test_random_order_belongs_to_its_generator(routing: Routing, slots: int, seed: int) -> None:
    first_N = kept_within(routing, slots, "random", make_generator(seed))
    torch.manual_seed(seed + 1)
    assert torch.equal(first_N, kept_within(routing, slots, "random", make_generator(seed)))


@given(routings(), st.booleans(), st.booleans(), st.data())
def test_every_assignment_that_counts_has_a_row_of_its_expert(
    routing: Routing, may_pad: bool, masked: bool, data: st.DataObject
) -> None:
    if masked:
        size = routing.token_N.numel()
        routing = routing.keep(torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).bool())
    plan = DispatchPlan.of(routing, pad_for=torch.float32 if may_pad else None)
    groups = plan.groups
    assert groups.loads == tuple(routing.load_E.tolist())
    assert plan.assignment_R.numel() == groups.num_rows
    size_E = groups.load_E if groups.capacity is None else torch.full_like(groups.load_E, groups.capacity)
    expert_R = torch.arange(routing.num_experts).repeat_interleave(size_E)
    real_R = plan.assignment_R < routing.token_N.numel()
    counting = torch.arange(routing.token_N.numel()) if routing.kept_N is None else routing.kept_N.nonzero()[:, 0]
    assert plan.assignment_R[real_R].sort().values.tolist() == counting.tolist()
    assert torch.equal(routing.expert_N[plan.assignment_R[real_R]], expert_R[real_R])
    assert torch.equal(plan.token_R[real_R], routing.token_N[plan.assignment_R[real_R]])
    assert torch.equal(plan.assignment_R[plan.row_N[counting]], counting)
    weight_R = plan.weight_R(routing.weight_N)
    assert torch.equal(weight_R[real_R], routing.weight_N[plan.assignment_R[real_R]])
    assert not weight_R[~real_R].any()


@given(st.integers(0, 9), st.integers(1, 5), st.booleans(), st.data())
def test_identity_experts_return_the_tokens(num_tokens: int, num_experts: int, complete: bool, data) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = make_generator(data.draw(st.integers(0, 100)))
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
    weight_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts)
    if not complete:  # the same assignments as a list, in reverse
        order_N = torch.arange(routing.token_N.numel() - 1, -1, -1)
        routing = replace(
            routing,
            token_N=routing.token_N[order_N],
            expert_N=routing.expert_N[order_N],
            weight_N=routing.weight_N[order_N],
            top_k=None,
        )
    x_TD = torch.randn(num_tokens, 3, generator=generator, dtype=torch.float64)
    plan = DispatchPlan.of(routing)
    torch.testing.assert_close(combine(dispatch(x_TD, plan), routing.weight_N, plan), x_TD)
