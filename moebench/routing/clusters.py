"""Clusters of token ids by the company that they keep in the training text."""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import UsageError

DIMENSIONS = 32
"""Of the vectors that are clustered; fewer where there are fewer ids."""


def token_vectors(pairs_VV: Tensor) -> Tensor:
    """Return a vector of each id, fp64 [V, D], from how often each id follows each: ids in like contexts lie close.

    The rows are those of the positive pointwise mutual information with the ids on the left and on the right, by its
    largest singular directions and at unit length (Levy and Goldberg 2014, "Neural word embedding as implicit matrix
    factorization": what skip-gram learns). An id that never occurs has the zero vector.
    """
    counts_VC = torch.cat([pairs_VV.T, pairs_VV], dim=1).double()
    expected_VC = torch.outer(counts_VC.sum(1), counts_VC.sum(0)) / counts_VC.sum().clamp(min=1)
    ratio_VC = counts_VC / expected_VC.clamp(min=1e-12)
    left_VD, size_D, _ = torch.linalg.svd(ratio_VC.clamp(min=1).log(), full_matrices=False)
    return functional.normalize(left_VD[:, :DIMENSIONS] * size_D[:DIMENSIONS].sqrt(), dim=1)


def cluster_token_ids(pairs_VV: Tensor, num_experts: int, seed: int) -> Tensor:
    """Return the expert of each id, int64 [V]: k-means clusters of their vectors."""
    from scipy.cluster.vq import kmeans2

    vector_VD = token_vectors(pairs_VV).numpy()
    if len(np.unique(vector_VD, axis=0)) < num_experts:
        raise UsageError(
            f"router.table: 'clustered' finds fewer than {num_experts} kinds of ids in this text (allowed: balanced,"
            " random, or fewer experts)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")  # an expert without ids idles
        _, cluster_V = kmeans2(vector_VD, num_experts, iter=50, minit="++", seed=seed)
    return torch.from_numpy(cluster_V).long()
