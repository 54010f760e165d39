"""Clusters of token ids by the contexts in which they occur in the training text."""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moebench.errors import UsageError

NUM_DIMENSIONS = 32
"""Dimensions of the clustered vectors, at most; a smaller vocabulary gives fewer."""


def embed_token_ids(pairs_VV: Tensor) -> Tensor:
    """Return a unit vector for each token id, fp64 [V, D]: ids that occur in similar contexts get similar vectors.

    `pairs_VV`: how often each id (row) is followed by each id (column). The vectors are the rows of the positive
    pointwise mutual information with the left and right neighbours, projected to its largest singular directions (Levy
    and Goldberg 2014, "Neural word embedding as implicit matrix factorization": what skip-gram learns). An id that
    never occurs has the zero vector.
    """
    counts_VC = torch.cat([pairs_VV.T, pairs_VV], dim=1).double()
    expected_VC = torch.outer(counts_VC.sum(1), counts_VC.sum(0)) / counts_VC.sum().clamp(min=1)
    ratio_VC = counts_VC / expected_VC.clamp(min=1e-12)
    left_VD, size_D, _ = torch.linalg.svd(ratio_VC.clamp(min=1).log(), full_matrices=False)
    return functional.normalize(left_VD[:, :NUM_DIMENSIONS] * size_D[:NUM_DIMENSIONS].sqrt(), dim=1)


def cluster_token_ids(pairs_VV: Tensor, num_experts: int, seed: int) -> Tensor:
    """Return the expert of each id, int64 [V]: its k-means cluster.

    Raises UsageError when the text has fewer distinct vectors than experts.
    """
    from scipy.cluster.vq import kmeans2

    vector_VD = embed_token_ids(pairs_VV).numpy()
    if len(np.unique(vector_VD, axis=0)) < num_experts:
        raise UsageError(
            f"router.table: 'clustered' finds fewer than {num_experts} distinct token ids in this text (allowed:"
            " balanced, random, or fewer experts)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")  # its expert stays idle
        _, cluster_V = kmeans2(vector_VD, num_experts, iter=50, minit="++", seed=seed)
    return torch.from_numpy(cluster_V).long()
