"""Spearman's correlation of two values per token; its interval is over sequences, whose tokens belong together."""

import math

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

NUM_RESAMPLES = 1000
CONFIDENCE = 0.95


def spearman(x_N: Values, y_N: Values) -> float | None:
    """Return Spearman's rank correlation, ties by their mean rank; None where one of the values is constant."""
    return _correlate(_Ranking(x_N), _Ranking(y_N), np.ones(len(x_N)))


def bootstrap_interval(
    x_N: Values, y_N: Values, cluster_N: NDArray[np.int64], seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of Spearman's correlation over resamples of whole clusters.

    Ranks are computed in each of 1,000 resamples. None below three clusters, and where a value is constant.
    """
    rankings = _Ranking(x_N), _Ranking(y_N)
    _, index_N = np.unique(cluster_N, return_inverse=True)
    num_clusters = int(index_N.max()) + 1 if len(index_N) else 0
    if num_clusters < 3 or _correlate(*rankings, np.ones(len(x_N))) is None:
        return None
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(NUM_RESAMPLES):
        drawn_C = np.bincount(generator.integers(num_clusters, size=num_clusters), minlength=num_clusters)
        value = _correlate(*rankings, drawn_C[index_N].astype(np.float64))
        if value is not None:
            values.append(value)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


class _Ranking:
    """The order of N values, from which their mean ranks follow when each counts several times."""

    def __init__(self, x_N: Values) -> None:
        _, self.group_N = np.unique(x_N, return_inverse=True)

    def compute_ranks(self, weight_N: Values) -> Values:
        """Return the mean rank of each value in the sample in which value n occurs weight_N[n] times."""
        size_G = np.bincount(self.group_N, weights=weight_N)
        rank_G = np.cumsum(size_G) - (size_G - 1) / 2
        ranks_N: Values = rank_G[self.group_N]
        return ranks_N


def _correlate(x: _Ranking, y: _Ranking, weight_N: Values) -> float | None:
    total = weight_N.sum()
    if not total:
        return None
    x_N, y_N = x.compute_ranks(weight_N), y.compute_ranks(weight_N)
    # Sums of products, because dot products of BLAS start threads that wait for busy cores.
    x_N, y_N = x_N - (weight_N * x_N).sum() / total, y_N - (weight_N * y_N).sum() / total
    scale = math.sqrt(float((weight_N * x_N**2).sum()) * float((weight_N * y_N**2).sum()))
    return float((weight_N * x_N * y_N).sum()) / scale if scale > 0 else None
