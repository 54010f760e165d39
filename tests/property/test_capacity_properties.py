"""Capacity, dispatch and combine on arbitrary routings."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.experts.capacity import Capacity, kept_within
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.routing.values import Routing


@st.composite
def routings(draw: st.DrawFn, with_priority: bool | None = None) -> Routing:
    """Draw a list of assignments in any order, with many ties among weights and priorities."""
    num_tokens, num_experts = draw(st.integers(0, 9)), draw(st.integers(1, 5))
    pair = st.tuples(st.integers(0, max(num_tokens - 1, 0)), st.integers(0, num_experts - 1))
    pairs = draw(st.lists(pair, unique=True, max_size=24)) if num_tokens else []
    value = st.lists(st.sampled_from([0.0, 0.25, 0.5]), min_size=len(pairs), max_size=len(pairs))
    has_priority = draw(st.booleans()) if with_priority is None else with_priority
    return Routing(
        token_N=torch.tensor([token for token, _ in pairs], dtype=torch.int64),
        expert_N=torch.tensor([expert for _, expert in pairs], dtype=torch.int64),
        weight_N=torch.tensor(draw(value)),
        num_tokens=num_tokens,
        num_experts=num_experts,
        priority_N=torch.tensor(draw(value)) if has_priority else None,
    )


orders = st.sampled_from(["router", "position", "score", "random"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def queue(routing: Routing, order: str) -> list[int]:
    """Return the assignments from the first to be kept to the last, the slow and obvious way."""
    tokens, weights = routing.token_N.tolist(), routing.weight_N.tolist()
    if order == "router" and routing.priority_N is not None:
        priority = routing.priority_N.tolist()
        return sorted(range(len(tokens)), key=lambda n: (-priority[n], n))
    if order == "score":
        return sorted(range(len(tokens)), key=lambda n: (-weights[n], n))
    if order == "random":
        return torch.randperm(len(tokens), generator=seeded()).tolist()
    return sorted(range(len(tokens)), key=lambda n: (tokens[n], n))


@given(routings(), st.integers(0, 6), orders)
def test_each_expert_keeps_the_first_of_its_queue(routing: Routing, slots: int, order: str) -> None:
    kept_N = kept_within(routing, slots, order, seeded()).tolist()
    free = Counter(dict.fromkeys(range(routing.num_experts), slots))
    for assignment in queue(routing, order):
        expert = int(routing.expert_N[assignment])
        assert kept_N[assignment] is (free[expert] > 0)
        free[expert] -= 1


@given(routings(), st.integers(0, 6), orders)
def test_kept_and_dropped_add_up(routing: Routing, slots: int, order: str) -> None:
    kept = routing.keep(kept_within(routing, slots, order, seeded()))
    assert torch.equal(kept.load_E, routing.load_E.clamp(max=slots))
    assert kept.experts_per_token_T.sum() == kept.load_E.sum() == kept.compact().token_N.numel()


@given(routings(), st.integers(0, 5), orders)
def test_more_slots_keep_what_fewer_kept(routing: Routing, slots: int, order: str) -> None:
    fewer_N = kept_within(routing, slots, order, seeded())
    more_N = kept_within(routing, slots + 1, order, seeded())
    assert (more_N | ~fewer_N).all()


@given(st.integers(0, 500), st.integers(1, 64), st.floats(1e-3, 64), st.floats(1, 4))
def test_slots_grow_with_the_factor(num_assignments: int, num_experts: int, factor: float, more: float) -> None:
    def slots(factor: float) -> int:
        rule = Capacity(train=factor)
        found = rule.slots(training=True, num_assignments=num_assignments, num_experts=num_experts)
        assert found is not None
        assert rule.slots(training=False, num_assignments=num_assignments, num_experts=num_experts) is None
        return found

    assert slots(factor) <= slots(factor * more)
    assert slots(factor) >= factor * num_assignments / num_experts - 1e-6
    assert slots(factor) <= math.ceil(factor * num_assignments / num_experts)


@pytest.mark.parametrize(
    ("factor", "num_assignments", "num_experts", "slots"),
    [
        (1.0, 16, 4, 4),  # even
        (1.0, 17, 4, 5),  # rounded up
        (1.25, 16, 4, 5),
        (1.1, 10, 1, 11),  # 1.1 · 10 is 11.000000000000002 in fp64: still 11
        (0.25, 1, 8, 1),  # never rounded down to "no limit" or to nothing
        (1.0, 0, 8, 0),
        (math.inf, 16, 4, None),
        (None, 16, 4, None),
    ],
)
def test_slots_by_hand(factor: float | None, num_assignments: int, num_experts: int, slots: int | None) -> None:
    rule = Capacity(train=factor, eval=factor)
    for training in (True, False):
        found = rule.slots(training=training, num_assignments=num_assignments, num_experts=num_experts)
        assert found == slots


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
    kept = {order: kept_within(routing, 2, order, seeded()).tolist() for order in ("position", "score", "router")}
    assert kept == {
        "position": [True, True, False, False],
        "score": [False, True, True, False],
        "router": [False, False, True, True],
    }
    by_position = kept_within(replace(routing, priority_N=None), 2, "router", seeded())
    assert by_position.tolist() == [True, True, False, False]


@given(routings(), st.integers(1, 3), st.integers(0, 1000))
def test_random_order_belongs_to_its_generator(routing: Routing, slots: int, seed: int) -> None:
    first_N = kept_within(routing, slots, "random", seeded(seed))
    torch.manual_seed(seed + 1)
    assert torch.equal(first_N, kept_within(routing, slots, "random", seeded(seed)))


@given(routings(), st.booleans(), st.booleans(), st.data())
def test_every_assignment_that_counts_has_a_row_of_its_expert(
    routing: Routing, may_pad: bool, masked: bool, data: st.DataObject
) -> None:
    if masked:
        size = routing.token_N.numel()
        routing = routing.keep(torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).bool())
    plan = DispatchPlan.of(routing, may_pad=may_pad)
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
    weight_R = plan.weight_R(routing.weight_N)[:, 0]
    assert torch.equal(weight_R[real_R], routing.weight_N[plan.assignment_R[real_R]])
    assert not weight_R[~real_R].any()


@given(st.integers(0, 9), st.integers(1, 5), st.booleans(), st.data())
def test_identity_experts_give_the_tokens_back(num_tokens: int, num_experts: int, whole: bool, data) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    generator = seeded(data.draw(st.integers(0, 100)))
    expert_TK = torch.rand(num_tokens, num_experts, generator=generator).topk(top_k, dim=-1).indices
    weight_TK = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts)
    if not whole:  # the same assignments as a list, in reverse
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
