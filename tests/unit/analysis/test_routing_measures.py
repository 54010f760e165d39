"""Saturation, churn, co-activation and similarity: numbers by hand and slow computations of the same numbers."""

import itertools
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from moebench.analysis.dynamics.measures import (
    average_strongest_partner,
    compute_agreement,
    compute_chance_agreement,
    compute_coactivation,
    compute_matched_similarity,
    compute_pair_similarity,
    find_changed_tokens,
    find_last_changes,
    list_expert_weights,
    swap_experts,
)
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.mixed import DeepBank, MixedBank, ZeroBank
from moebench.seeds import make_generator


def table(*rows: str) -> Tensor:
    """Return member_TE from a text of 0 and 1 for each token."""
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


def random_table(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    """Return a table in which tokens have 0 to E experts."""
    return torch.rand(num_tokens, num_experts, generator=make_generator(seed)) < 0.4


def test_agreement_by_hand() -> None:
    # Of two experts each: both, one and none in common.
    first, second = table("1100", "1100", "1100"), table("1100", "0110", "0011")
    assert compute_agreement(first, second) == pytest.approx((1 + 0.5 + 0) / 3)
    # With other numbers of experts: 2 * 1 / (1 + 3); a token without any expert in both is left out, in one counts 0.
    first, second = table("1000", "0000", "0000"), table("1110", "0000", "0001")
    assert compute_agreement(first, second) == pytest.approx((0.5 + 0) / 2)


def test_agreement_of_k_experts_is_the_saturation_of_olmoe() -> None:
    draw = random.Random(0)
    rows = [[set(draw.sample(range(8), 3)) for _ in range(50)] for _ in range(2)]
    tables = [torch.tensor([[expert in chosen for expert in range(8)] for chosen in side]) for side in rows]
    slow = sum(len(first & second) / 3 for first, second in zip(*rows, strict=True)) / 50
    assert compute_agreement(*tables) == pytest.approx(slow)


def test_chance_by_hand() -> None:
    # All tokens take expert 0, and a quarter of them in the other routing: independent ones agree for a quarter.
    first, second = table("10", "10", "10", "10"), table("10", "01", "01", "01")
    assert compute_chance_agreement(first, second) == pytest.approx(0.25)
    # Even loads over E experts with k of them agree by k / E.
    even = table("1100", "0011", "0110", "1001")
    assert compute_chance_agreement(even, even) == pytest.approx(2 / 4)


def test_chance_is_the_mean_over_all_pairs_of_tokens() -> None:
    first, second = random_table(12, 4, 0), random_table(9, 4, 1)
    pairs = [(a, b) for a, b in itertools.product(first, second) if a.any() or b.any()]
    slow = sum(2 * int((a & b).sum()) / int(a.sum() + b.sum()) for a, b in pairs) / len(pairs)
    assert compute_chance_agreement(first, second) == pytest.approx(slow)


def test_changes_by_hand() -> None:
    # The first token changes early, the second late, the third never, the fourth there and back.
    tables = [table("10", "10", "10", "10"), table("01", "10", "10", "01"), table("01", "01", "10", "10")]
    assert find_changed_tokens(tables[0], tables[1]).tolist() == [True, False, False, True]
    assert find_last_changes(tables) == [0.75, 0.5]
    assert find_last_changes(tables[:1]) == []


def test_coactivation_by_hand() -> None:
    member_TE = table("110", "110", "101", "100")
    # Expert 0 has 4 tokens: 2 with expert 1, 1 with expert 2; those of 1 and 2 always have expert 0.
    share = compute_coactivation(member_TE)
    assert share.tolist() == [[1, 0.5, 0.25], [1, 1, 0], [1, 0, 1]]
    assert average_strongest_partner(member_TE) == pytest.approx((0.5 + 1 + 1) / 3)
    # An expert without tokens has no partner and counts nowhere.
    assert average_strongest_partner(table("1100", "1100", "1010", "1000")) == pytest.approx((0.5 + 1 + 1) / 3)
    assert average_strongest_partner(table("10", "01")) is None


def list_tables(sizes: tuple[int, ...], loads: tuple[int, ...]) -> Iterator[Tensor]:
    """Yield every routing with these numbers of experts and these loads."""
    choices = [list(itertools.combinations(range(len(loads)), size)) for size in sizes]
    for chosen in itertools.product(*choices):
        member_TE = torch.tensor([[expert in row for expert in range(len(loads))] for row in chosen])
        if member_TE.sum(0).tolist() == list(loads):
            yield member_TE


def test_trades_reach_every_routing_equally_often() -> None:
    sizes, loads = (2, 2, 1, 3), (3, 2, 2, 1)
    every = {tuple(member_TE.flatten().tolist()) for member_TE in list_tables(sizes, loads)}
    member_TE = next(list_tables(sizes, loads))
    counts = dict.fromkeys(every, 0)
    generator = make_generator("test of trades")
    num_draws = 60 * len(every)
    for _ in range(num_draws):
        member_TE = swap_experts(member_TE, generator, 6)
        assert member_TE.sum(1).tolist() == list(sizes)
        assert member_TE.sum(0).tolist() == list(loads)
        counts[tuple(member_TE.flatten().tolist())] += 1
    # Chi-square with about as many degrees of freedom as routings: twice that is far out.
    expected = num_draws / len(every)
    assert len(every) > 10
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 2 * len(every)


def test_similarity_of_pairs_is_the_slow_mean() -> None:
    groups = [torch.randn(5, 7, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64), torch.randn(1, 2)]
    cosine = torch.nn.functional.cosine_similarity
    slow = [
        float(cosine(group[i], group[j], dim=0))
        for group in groups
        for i, j in itertools.combinations(range(len(group)), 2)
    ]
    assert compute_pair_similarity(groups) == pytest.approx(sum(slow) / len(slow))
    assert compute_pair_similarity(groups[2:]) is None


def test_similarity_by_hand() -> None:
    # Equal, opposite and orthogonal experts: cosines 1, -1, 0 and 0, and so on.
    experts = torch.tensor([[1.0, 0], [2, 0], [-3, 0], [0, 1]], dtype=torch.float64)
    assert compute_pair_similarity([experts]) == pytest.approx((1 - 1 + 0 - 1 + 0 + 0) / 6)
    turned = torch.tensor([[0.0, 1], [2, 0], [3, 0], [0, 5]], dtype=torch.float64)
    assert compute_matched_similarity([experts], [turned]) == pytest.approx((0 + 1 - 1 + 1) / 4)
    assert compute_matched_similarity([], []) is None


def test_the_weights_of_experts_are_grouped_by_shape() -> None:
    def bank(width: int, number: int) -> ExpertBank:
        return ExpertBank(6, width, number, "gelu")

    deep = DeepBank([bank(4, 2), bank(4, 2)])
    groups = list_expert_weights(MixedBank([bank(8, 3), deep, ZeroBank(6, 2)]))
    assert [tuple(group.shape) for group in groups] == [(3, 2 * 6 * 8), (2, 2 * 2 * 6 * 4)]
    assert list_expert_weights(ZeroBank(6, 2)) == []
