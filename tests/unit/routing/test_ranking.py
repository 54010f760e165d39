"""Rankings: near ties resolved by index, real differences by value."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebench.routing.ranking import (
    QUANTUM,
    SCORE_QUANTUM,
    TOLERANCE,
    log_scores,
    merge_near_ties,
    rank_all,
    rank_top_k,
    round_to_quantum,
    take_best_tokens,
)

TIED = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.5, 2.0])


def add_noise(value: Tensor, seed: int, size: float = 5e-7) -> Tensor:
    return value + size * (2 * torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) - 1)


@pytest.mark.parametrize("seed", range(20))
def test_near_ties_go_to_the_lower_index(seed: int) -> None:
    noisy_E = add_noise(TIED, seed)
    assert rank_all(noisy_E).tolist() == [1, 3, 5, 0, 4, 2]
    assert [rank_top_k(noisy_E, k).tolist() for k in (1, 2, 4)] == [[1], [1, 3], [1, 3, 5, 0]]
    column_TE = torch.stack([noisy_E, -noisy_E], dim=1)
    assert rank_top_k(column_TE, 3, dim=0).T.tolist() == [[1, 3, 5], [2, 0, 4]]
    assert rank_top_k(column_TE, 1, dim=0).T.tolist() == [[1], [2]]
    assert rank_all(column_TE, dim=0)[:4].T.tolist() == [[1, 3, 5, 0], [2, 0, 4, 1]]


def test_differences_above_the_quantum_are_not_ties() -> None:
    assert rank_top_k(torch.tensor([1.0, 1.0 + 2 * QUANTUM]), 1).tolist() == [1]
    assert rank_top_k(torch.tensor([0.5, 0.5 + 2 * SCORE_QUANTUM]), 1, quantum=SCORE_QUANTUM).tolist() == [1]
    assert rank_all(torch.tensor([1.0, 1.0 + 2 * TOLERANCE, 1.0])).tolist() == [1, 0, 2]
    # Small probabilities are compared by ratio: .00001 and .000011 differ as .1 and .11 do.
    assert rank_all(log_scores(torch.tensor([1e-5, 1.1e-5, 0.0, 1e-5]))).tolist() == [1, 0, 3, 2]
    assert round_to_quantum(torch.tensor([0.0, QUANTUM, 1.0])).tolist() == [0, 1, 2**14]


def test_infinite_and_huge_values_are_ranked() -> None:
    value_E = torch.tensor([-torch.inf, 3e38, 0.0, torch.inf, -3e38, -torch.inf])
    assert rank_top_k(value_E, 6).tolist() == [1, 3, 2, 0, 4, 5]  # values beyond 1e14 tie
    assert rank_all(value_E).tolist() == [3, 1, 2, 4, 0, 5]
    assert torch.isfinite(log_scores(torch.zeros(2))).all(), "-inf is reserved for excluded"


def test_near_ties_become_levels() -> None:
    # Column 0: .1 .2 .2+ε .3: three levels. Column 1: a run of neighbours is one level however long it is.
    value_TE = torch.tensor([[0.2, 0.02], [0.1, 0.0], [0.3, 0.03], [0.2001, 0.01]])
    merged_TE, level_TE = merge_near_ties(value_TE, 0, 0.011)
    assert merged_TE.T.tolist() == [pytest.approx([0.2, 0.1, 0.3, 0.2]), [0.0] * 4]
    assert level_TE.T.tolist() == [[1, 0, 3, 1], [0, 0, 0, 0]]
    assert all(
        torch.equal(ours.T, theirs)
        for ours, theirs in zip(merge_near_ties(value_TE.T, -1, 0.011), (merged_TE, level_TE), strict=True)
    )


def test_rank_all_accepts_integers() -> None:
    assert rank_all(torch.tensor([-3, -1, -2, -1])).tolist() == [1, 3, 2, 0]


def test_repeated_tokens_tie_at_any_score() -> None:
    # A thousand scores, each occurring twice with noise: both tie, also on the boundary of two quanta.
    value_T = torch.rand(1000, generator=torch.Generator().manual_seed(0)).repeat(2)
    level_T = merge_near_ties(add_noise(value_T, 1), 0)[1]
    assert torch.equal(level_T[:1000], level_T[1000:])
    assert len(level_T.unique()) > 980  # the others are within the tolerance of a neighbour


def test_empty_inputs() -> None:
    assert rank_top_k(torch.zeros(0, 4), 2).shape == (0, 2)
    assert rank_top_k(torch.zeros(0, 4), 1).shape == (0, 1)
    assert take_best_tokens(torch.zeros(2, 0, 4), 0, torch.zeros(2, dtype=torch.int64)).shape == (2, 0, 4)
    assert rank_all(torch.zeros(0)).shape == (0,)


levels = st.lists(st.sampled_from([-2.0, 0.0, 0.25, 1.0, 7.5]), min_size=1, max_size=12)


@given(levels, st.integers(1, 12), st.integers(0, 99))
def test_top_k_is_the_head_of_a_stable_sort(values: list[float], k: int, seed: int) -> None:
    k = min(k, len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    noisy_E = add_noise(torch.tensor(values), seed)
    assert rank_top_k(noisy_E, k).tolist() == expected[:k]
    assert rank_all(noisy_E).tolist() == expected
    for capacity in range(k + 1):
        taken = take_best_tokens(noisy_E.view(1, -1, 1), k, torch.tensor([capacity])).flatten().tolist()
        assert len(set(taken)) == k
        assert set(taken[:capacity]) == set(expected[:capacity])


def test_rankings_have_no_gradient() -> None:
    assert not rank_top_k(TIED.clone().requires_grad_(), 2).requires_grad
    assert not round_to_quantum(TIED.clone().requires_grad_()).requires_grad
