import dataclasses

import pytest
import torch

from moebench.errors import UsageError
from moebench.routing.router import Causality, Facts, check_top_k
from moebench.routing.routers.dense import Dense
from moebench.routing.routers.hash import Hash
from moebench.routing.values import LayerRecord, Routing


def route_two_tokens() -> Routing:
    """Route token 0 to experts 2 and 0, token 1 to experts 2 and 1."""
    routing = Routing.from_top_k(
        torch.tensor([[2, 0], [2, 1]]),
        torch.tensor([[0.7, 0.3], [0.6, 0.4]]),
        num_experts=4,
        token_extras={"x": torch.tensor([5.0, 6.0])},
    )
    return dataclasses.replace(routing, priority_N=torch.tensor([9, 7, 8, 6]), extras={"mean": torch.ones(1)})


def test_from_top_k_lists_assignments_by_token() -> None:
    routing = route_two_tokens()
    assert routing.token_N.tolist() == [0, 0, 1, 1]
    assert routing.expert_N.tolist() == [2, 0, 2, 1]
    assert routing.weight_N.tolist() == pytest.approx([0.7, 0.3, 0.6, 0.4])
    assert routing.priority_N is not None
    assert routing.priority_N.tolist() == [9, 7, 8, 6]
    assert (routing.num_tokens, routing.num_experts, routing.top_k) == (2, 4, 2)
    assert routing.load_E.tolist() == [1, 1, 2, 0]
    assert routing.experts_per_token_T.tolist() == [2, 2]


def test_masked_assignments_are_not_counted() -> None:
    routing = route_two_tokens()
    kept = routing.keep(torch.tensor([False, False, True, True]))
    assert kept.top_k == 2, "keep() does not change the shape"
    assert kept.weight_N[:2].tolist() == [0.0, 0.0]
    assert kept.load_E.sum() == 2
    assert kept.experts_per_token_T.tolist() == [0, 2]
    assert kept.extras is routing.extras
    assert kept.token_extras is routing.token_extras
    assert routing.kept_N is None, "keep() returns a new value"
    assert LayerRecord(routing=routing, kept=kept).num_dropped == 2
    fewer = kept.keep(torch.tensor([True, False, True, False]))
    assert fewer.kept_N is not None
    assert fewer.kept_N.tolist() == [False, False, True, False]


def test_compact_lists_kept_assignments_only() -> None:
    routing = route_two_tokens()
    assert routing.compact() is routing
    compact = routing.keep(torch.tensor([False, False, True, True])).compact()
    assert compact.token_N.tolist() == [1, 1]
    assert compact.priority_N is not None
    assert compact.priority_N.tolist() == [8, 6]
    assert (compact.top_k, compact.kept_N, compact.num_tokens) == (None, None, 2)
    assert compact.experts_per_token_T.tolist() == [0, 2]


def test_values_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        route_two_tokens().num_tokens = 3  # type: ignore[misc]


def facts(causal: bool, with_capacity: bool | None) -> Facts:
    return Facts(
        family="f",
        equation="e",
        paper="p",
        causality=Causality(causal=causal, reason="r", batch_dependent=False, with_capacity=with_capacity),
    )


@pytest.mark.parametrize(
    ("causal", "with_capacity", "dropless", "capacity"),
    [
        (True, None, True, True),
        (True, True, True, True),
        (True, False, True, False),
        (False, None, False, False),
        (False, True, False, False),
    ],
)
def test_is_causal_with_and_without_capacity(causal, with_capacity, dropless, capacity) -> None:
    causality = facts(causal, with_capacity).causality
    assert causality.is_causal(with_capacity=False) is dropless
    assert causality.is_causal(with_capacity=True) is capacity


@pytest.mark.parametrize(("top_k", "smallest", "fits"), [(1, 1, True), (8, 1, True), (0, 1, False), (9, 1, False)])
def test_check_top_k(top_k: int, smallest: int, fits: bool) -> None:
    if fits:
        check_top_k(top_k, 8, smallest)
        return
    with pytest.raises(UsageError, match=rf"^router\.top_k={top_k} does not fit layout\.num_experts=8 \(allowed"):
        check_top_k(top_k, 8, smallest)


def test_check_top_k_states_the_reason_below_the_minimum() -> None:
    with pytest.raises(UsageError, match=r"; because\)$"):
        check_top_k(1, 8, 2, "because")
    with pytest.raises(UsageError) as caught:
        check_top_k(9, 8, 2, "because")
    assert "because" not in str(caught.value)


def test_hash_without_token_ids_is_refused() -> None:
    from support.cases import build_context

    without_ids = build_context(4, token_count_V=None)
    with pytest.raises(UsageError, match=r"router\.name: 'hash' routes by token id, which this task does not have"):
        Hash(Hash.Config(), without_ids)
    assert Dense(Dense.Config(), without_ids).form.is_dense
