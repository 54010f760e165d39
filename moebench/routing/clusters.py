"""Clusters of token ids by the contexts in which they occur in the training text."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from moebench.errors import UsageError

NUM_DIMENSIONS = 32
"""Dimensions of the clustered vectors, at most; a smaller vocabulary gives fewer."""
MAX_DENSE = 512
"""Number of ids up to which all singular vectors are computed; above it, only the largest, which is faster."""


def embed_token_ids(pairs_VV: Tensor) -> Tensor:
    """Return a unit vector for each token id, fp64 [V, D]: ids that occur in similar contexts get similar vectors.

    `pairs_VV`: how often each id (row) is followed by each id (column). The vectors are the rows of the positive
    pointwise mutual information with the left and right neighbours, projected to its largest singular directions (Levy
    and Goldberg 2014, "Neural word embedding as implicit matrix factorization": what skip-gram learns). An id that
    never occurs has the zero vector.
    """
    left_VD, size_D = _find_largest_directions(_weigh_pairs(pairs_VV.numpy()))
    vector_VD = torch.from_numpy(left_VD * np.sqrt(size_D))
    # A row of zeros comes back as rounding errors, which must not become a unit vector.
    return functional.normalize(vector_VD.where(vector_VD.norm(dim=1, keepdim=True) > 1e-9, 0), dim=1)


def _weigh_pairs(pairs_VV: NDArray[np.int64]) -> Any:
    """Return the positive pointwise mutual information of each id (row) with its neighbours, sparse [V, 2 V]."""
    from scipy.sparse import csr_array, hstack

    following_VV = csr_array(pairs_VV, dtype=np.float64)
    weight_VC = hstack([following_VV.T, following_VV], format="coo")
    weight_VC.sum_duplicates()  # sorts the pairs, which a sum would do later, between two readings of them
    expected_N = weight_VC.sum(1)[weight_VC.row] * weight_VC.sum(0)[weight_VC.col] / max(weight_VC.sum(), 1)
    weight_VC.data = np.log(np.maximum(weight_VC.data / expected_N, 1))
    return weight_VC.tocsr()


def _find_largest_directions(matrix_VC: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the left singular vectors, [V, D], of the largest singular values, and these, [D]."""
    from scipy.sparse.linalg import svds

    if matrix_VC.shape[0] <= MAX_DENSE:
        left_VD, size_D, _ = np.linalg.svd(matrix_VC.toarray(), full_matrices=False)
        return left_VD[:, :NUM_DIMENSIONS], size_D[:NUM_DIMENSIONS]
    # With a given start, the same text gives the same vectors. The values are in ascending order.
    left_VD, size_D, _ = svds(matrix_VC, k=NUM_DIMENSIONS, v0=np.ones(matrix_VC.shape[0]))
    return left_VD[:, ::-1], size_D[::-1]


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
