"""Ranking: ties by index, noise that decides nothing, and differences that do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebench.routing.ranking import QUANTUM, SCORE_QUANTUM, log_scores, rank_all, rank_top_k, rounded

TIED = torch.tensor([0.5, 2.0, -1.0, 2.0, 0.5, 2.0])


def noise(value: Tensor, seed: int, size: float = 5e-7) -> Tensor:
    return value + size * (2 * torch.rand(value.shape, generator=torch.Generator().manual_seed(seed)) - 1)


@pytest.mark.parametrize("seed", range(20))
def test_near_ties_go_to_the_lower_index(seed: int) -> None:
    noisy_E = noise(TIED, seed)
    assert rank_all(noisy_E).tolist() == [1, 3, 5, 0, 4, 2]
    assert [rank_top_k(noisy_E, k).tolist() for k in (1, 2, 4)] == [[1], [1, 3], [1, 3, 5, 0]]
    column_TE = torch.stack([noisy_E, -noisy_E], dim=1)
    assert rank_top_k(column_TE, 3, dim=0).T.tolist() == [[1, 3, 5], [2, 0, 4]]


def test_what_differs_by_more_than_the_quantum_is_no_tie() -> None:
    assert rank_top_k(torch.tensor([1.0, 1.0 + 2 * QUANTUM]), 1).tolist() == [1]
    assert rank_top_k(torch.tensor([0.5, 0.5 + 2 * SCORE_QUANTUM]), 1, quantum=SCORE_QUANTUM).tolist() == [1]
    # Probabilities of one token among many: .0001 and .00011 are as far apart as .1 and .11.
    assert rank_all(log_scores(torch.tensor([1e-5, 1.1e-5, 0.0, 1e-5]))).tolist() == [1, 0, 3, 2]
    assert rounded(torch.tensor([0.0, QUANTUM, 1.0])).tolist() == [0, 1, 2**14]


def test_infinities_and_huge_values_have_their_place() -> None:
    value_E = torch.tensor([-torch.inf, 3e38, 0.0, torch.inf, -3e38, -torch.inf])
    assert rank_top_k(value_E, 6).tolist() == [1, 3, 2, 0, 4, 5]  # beyond 1e14 all is one
    assert rank_all(value_E).tolist()[2:] == [2, 0, 4, 5]
    assert torch.isfinite(log_scores(torch.zeros(2))).all(), "-inf stays free to mean: not at all"


def test_nothing_to_rank() -> None:
    assert rank_top_k(torch.zeros(0, 4), 2).shape == (0, 2)
    assert rank_top_k(torch.zeros(0, 4), 1).shape == (0, 1)
    assert rank_top_k(torch.zeros(2, 0, 4), 0, dim=1).shape == (2, 0, 4)


levels = st.lists(st.sampled_from([-2.0, 0.0, 0.25, 1.0, 7.5]), min_size=1, max_size=12)


@given(levels, st.integers(1, 12), st.integers(0, 99))
def test_top_k_is_the_head_of_a_stable_sort(values: list[float], k: int, seed: int) -> None:
    k = min(k, len(values))
    expected = sorted(range(len(values)), key=lambda i: (-values[i], i))
    noisy_E = noise(torch.tensor(values), seed)
    assert rank_top_k(noisy_E, k).tolist() == expected[:k]
    assert rank_all(noisy_E).tolist() == expected


def test_the_gradient_stays_outside() -> None:
    assert not rank_top_k(TIED.clone().requires_grad_(), 2).requires_grad
    assert not rounded(TIED.clone().requires_grad_()).requires_grad
