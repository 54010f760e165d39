"""Routing that has learned nothing, as a scale for what trained experts say about labels."""

import numpy as np

from moebench.analysis.specialisation.information import Assignments, Ints


def route_randomly(like: Assignments, seed: int) -> Assignments:
    """Return assignments to experts drawn uniformly, as many different ones for each token as in `like`."""
    generator = np.random.default_rng(seed)
    rank_TE = generator.random((like.num_tokens, like.num_experts)).argsort(1)
    return _assign(rank_TE, like)


def route_by_hash(key_T: Ints, num_keys: int, like: Assignments, seed: int) -> Assignments:
    """Return assignments that the key of a token determines, as many experts for each token as in `like`."""
    generator = np.random.default_rng(seed)
    rank_VE = generator.random((num_keys, like.num_experts)).argsort(1)
    return _assign(rank_VE[key_T], like)


def _assign(rank_TE: Ints, like: Assignments) -> Assignments:
    count_T = np.bincount(like.token_N, minlength=like.num_tokens)
    token_N = np.repeat(np.arange(like.num_tokens), count_T)
    within_N = np.arange(len(token_N)) - np.repeat(count_T.cumsum() - count_T, count_T)
    return Assignments(
        token_N=token_N,
        expert_N=rank_TE[token_N, within_N],
        num_tokens=like.num_tokens,
        num_experts=like.num_experts,
    )
