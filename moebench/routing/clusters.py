"""Clusters of token ids by the contexts in which they occur in the training text."""

import warnings

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moebench.errors import UsageError

NUM_DIMENSIONS = 32
"""Dimensions of the clustered vectors, at most; a smaller vocabulary gives fewer."""
MAX_DENSE = 512
"""Ids of a vocabulary up to which all singular directions are computed; above, the largest ones of a sparse matrix."""


def embed_token_ids(pairs_VV: Tensor) -> Tensor:
    """Return a unit vector for each token id, fp64 [V, D]: ids that occur in similar contexts get similar vectors.

    `pairs_VV`: how often each id (row) is followed by each id (column). The vectors are the rows of the positive
    pointwise mutual information with the left and right neighbours, projected to its largest singular directions (Levy
    and Goldberg 2014, "Neural word embedding as implicit matrix factorization": what skip-gram learns). An id that
    never occurs has the zero vector.
    """
    if len(pairs_VV) > MAX_DENSE:
        left_VD, size_D = _find_largest_directions(pairs_VV.numpy())
    else:
        counts_VC = torch.cat([pairs_VV.T, pairs_VV], dim=1).double()
        expected_VC = torch.outer(counts_VC.sum(1), counts_VC.sum(0)) / counts_VC.sum().clamp(min=1)
        ratio_VC = counts_VC / expected_VC.clamp(min=1e-12)
        left_VD, size_D, _ = torch.linalg.svd(ratio_VC.clamp(min=1).log(), full_matrices=False)
    vector_VD = left_VD[:, :NUM_DIMENSIONS] * size_D[:NUM_DIMENSIONS].sqrt()
    # A row of zeros comes back as rounding errors, which must not become a unit vector.
    return functional.normalize(vector_VD.where(vector_VD.norm(dim=1, keepdim=True) > 1e-9, 0), dim=1)


def _find_largest_directions(pairs_VV: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return the left singular vectors, [V, D], and values of the same matrix: most pairs of many ids never occur."""
    from scipy.sparse import csr_array, hstack
    from scipy.sparse.linalg import svds

    following_VV = csr_array(pairs_VV, dtype=np.float64)
    counts_VC = hstack([following_VV.T, following_VV], format="coo")
    counts_VC.sum_duplicates()  # sorts the pairs, which a sum would do later, between two readings of them
    expected_N = counts_VC.sum(1)[counts_VC.row] * counts_VC.sum(0)[counts_VC.col] / counts_VC.sum()
    information_VC = counts_VC.copy()
    information_VC.data = np.log(np.maximum(counts_VC.data / expected_N, 1))
    # From a given start: the same text gives the same vectors. The values are in ascending order.
    left_VD, size_D, _ = svds(information_VC.tocsr(), k=NUM_DIMENSIONS, v0=np.ones(len(pairs_VV)))
    return torch.from_numpy(left_VD[:, ::-1].copy()), torch.from_numpy(size_D[::-1].copy())


def cluster_token_ids(pairs_VV: Tensor, num_experts: int, seed: int) -> Tensor:
    """Return the expert of each id, int64 [V]: its k-means cluster.

    Raises UsageError when the text has fewer distinct vectors than experts.
    """
    from scipy.cluster.vq import kmeans2

    vector_VD = embed_token_ids(pairs_VV).numpy()
    if len(np.unique(vector_VD.round(9), axis=0)) < num_experts:
        raise UsageError(
            f"router.table: 'clustered' finds fewer than {num_experts} distinct token ids in this text (allowed:"
            " balanced, random, or fewer experts)"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="One of the clusters is empty")  # its expert stays idle
        _, cluster_V = kmeans2(vector_VD, num_experts, iter=50, minit="++", seed=seed)
    return torch.from_numpy(cluster_V).long()
