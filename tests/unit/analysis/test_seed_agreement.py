"""Agreement of seeds after matching: planted structure, independence, and the interval over seeds."""

import itertools
from statistics import fmean

import pytest
import torch
from torch import Tensor

from moebench.analysis.dynamics.seed_agreement import (
    compare_pair,
    compare_seeds,
    compute_pairs_interval,
    match_experts,
)
from moebench.seeds import make_generator


def one_hot(*experts: int, num_experts: int) -> Tensor:
    """Return member_TE of tokens with one expert each."""
    return torch.nn.functional.one_hot(torch.tensor(experts), num_experts).bool()


def draw(num_tokens: int, num_experts: int, seed: int, top_k: int = 1) -> Tensor:
    """Return a random routing with k experts for each token."""
    score_TE = torch.rand(num_tokens, num_experts, generator=make_generator("agreement", seed))
    return torch.zeros(score_TE.shape, dtype=torch.bool).scatter(1, score_TE.topk(top_k).indices, True)


def test_matching_by_hand() -> None:
    # Expert 0 shares 3 tokens with 1 and 2 with 0; expert 1 shares 1 with 0 and 0 with 1: 3 + 1 of 6 beats 2 + 0.
    first = one_hot(0, 0, 0, 0, 0, 1, num_experts=2)
    second = one_hot(1, 1, 1, 0, 0, 0, num_experts=2)
    assert match_experts(first, second) == ([1, 0], pytest.approx(4 / 6))


@pytest.mark.parametrize("top_k", [1, 2])
def test_matching_is_the_best_of_all_permutations(top_k: int) -> None:
    first, second = draw(40, 5, 0, top_k), draw(40, 5, 1, top_k)
    shares = [int((first & second[:, list(order)]).sum()) / (40 * top_k) for order in itertools.permutations(range(5))]
    matching, share = match_experts(first, second)
    assert share == pytest.approx(max(shares))
    assert int((first & second[:, matching]).sum()) / (40 * top_k) == pytest.approx(share)


def test_the_same_experts_under_other_numbers_agree_fully() -> None:
    first = draw(500, 6, 0, 2)
    order = [3, 1, 5, 0, 2, 4]
    result = compare_pair(first, first[:, order], (0, 1), make_generator(0))
    assert result.agreement == 1
    assert result.corrected == pytest.approx(1)
    assert [order[expert] for expert in result.matching] == [0, 1, 2, 3, 4, 5]


def test_independent_routings_agree_by_chance() -> None:
    # Uneven loads agree for more than 1/E by themselves; corrected, nothing is left.
    probability_E = torch.tensor([0.5, 0.3, 0.1, 0.1])
    members = {
        seed: torch.nn.functional.one_hot(
            torch.multinomial(probability_E, 4000, replacement=True, generator=make_generator("independent", seed)), 4
        ).bool()
        for seed in range(5)
    }
    result = compare_seeds(members)
    assert result.agreement > 0.3
    assert abs(result.corrected) < 0.01
    assert result.interval is not None
    assert result.interval[0] < 0 < result.interval[1]
    assert result.verdict == "undecided"


def test_half_of_the_tokens_in_common_is_seen() -> None:
    shared = draw(2000, 8, 0)
    members = {seed: torch.cat([shared, draw(2000, 8, seed + 1)]) for seed in range(4)}
    result = compare_seeds(members)
    # Half agrees fully and the rest for about 1/8: (0.5 + 0.5/8 - 1/8) / (1 - 1/8) = 0.5.
    assert result.corrected == pytest.approx(0.5, abs=0.02)
    assert result.verdict == "more than chance"
    assert compare_seeds({seed: members[seed] for seed in (0, 1)}).interval is None


def test_the_interval_by_hand() -> None:
    # Three seeds: each left out leaves one pair. Mean 0.4, pseudo-spread (2/3) * (0.04 + 0 + 0.04) = 0.16 / 3.
    values = {(0, 1): 0.2, (0, 2): 0.4, (1, 2): 0.6}
    low, high = compute_pairs_interval(values) or (0, 0)
    half = 4.302653 * (0.16 / 3) ** 0.5  # t of 2 degrees of freedom
    assert (low, high) == (pytest.approx(0.4 - half, abs=1e-5), pytest.approx(0.4 + half, abs=1e-5))


def test_the_interval_of_several_layers_is_wider() -> None:
    values = {(0, 1): 0.5, (0, 2): 0.6, (1, 2): 0.9}
    low, high = compute_pairs_interval(values) or (0, 0)
    wide_low, wide_high = compute_pairs_interval(values, num_intervals=4) or (0, 0)
    # Quantiles of t with two degrees of freedom: 4.303 at 97.5 %, 8.860 at 99.375 %.
    assert (wide_high - wide_low) / (high - low) == pytest.approx(8.860 / 4.303, rel=1e-3)


def test_the_interval_covers_the_mean_of_dependent_pairs() -> None:
    # Pairs are sums of what their seeds have: the interval must be that of the seeds, not that of 10 pairs.
    misses = 0
    generator = make_generator("coverage")
    for _ in range(400):
        effect = torch.randn(5, generator=generator).tolist()
        values = {(i, j): effect[i] + effect[j] for i, j in itertools.combinations(range(5), 2)}
        assert fmean(values.values()) == pytest.approx(2 * fmean(effect))
        low, high = compute_pairs_interval(values) or (0, 0)
        misses += not low < 0 < high
    # 5 % of 400 are 20, with a standard deviation of 4.4; the jackknife may be wider, not narrower.
    assert misses < 34
