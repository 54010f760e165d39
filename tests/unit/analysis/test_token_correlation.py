"""Spearman's correlation with an interval over sequences."""

import numpy as np
import pytest
from scipy import stats

from moebench.analysis.token_compute.correlation import bootstrap_interval, spearman

DRAW = np.random.default_rng(0)


def test_equals_scipy_with_ties() -> None:
    x_N, y_N = DRAW.integers(0, 4, 500).astype(float), DRAW.normal(size=500)
    assert spearman(x_N, y_N) == pytest.approx(stats.spearmanr(x_N, y_N).statistic, abs=1e-12)
    assert spearman(x_N, x_N**3) == pytest.approx(1)
    assert spearman(x_N, -x_N) == pytest.approx(-1)


def test_a_constant_has_no_correlation() -> None:
    assert spearman(np.ones(10), np.arange(10.0)) is None
    assert bootstrap_interval(np.ones(10), np.arange(10.0), np.arange(10)) is None


def test_two_sequences_have_no_interval() -> None:
    x_N = np.arange(10.0)
    assert bootstrap_interval(x_N, x_N, np.repeat([0, 1], 5)) is None


def test_resamples_rank_the_drawn_tokens_anew() -> None:
    # Every resample of a perfect order is in perfect order, with ties.
    x_N = np.arange(40.0)
    assert bootstrap_interval(x_N, x_N**2, np.arange(40) // 4) == pytest.approx((1, 1))


def test_tokens_of_a_sequence_are_no_independent_evidence() -> None:
    # 20 sequences, whose 50 tokens are equal: the interval is that of 20 values, not of 1,000.
    x_C, y_C = DRAW.normal(size=20), DRAW.normal(size=20)
    cluster_N = np.repeat(np.arange(20), 50)
    low, high = bootstrap_interval(x_C[cluster_N], y_C[cluster_N], cluster_N) or (0, 0)
    naive_low, naive_high = bootstrap_interval(x_C[cluster_N], y_C[cluster_N], np.arange(1000)) or (0, 0)
    assert high - low > 4 * (naive_high - naive_low)
    assert low < stats.spearmanr(x_C, y_C).statistic < high
