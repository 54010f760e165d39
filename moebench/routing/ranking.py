"""Ranking that does not depend on the order of a sum: near ties are ties, and ties go to the lower index.

A batch that is divided among processes is summed in another order, so the same value differs in its last bits: fp32
logits by some 1e-7. Where two values are equal but for that (the same token twice, two experts with the same weights),
comparing them as they are lets the noise decide who is chosen, and from there on two meshes train two models. Every
choice among tokens or experts therefore goes through this module, in one of two ways.

- Tokens (`rank_all`, `merge_near_ties`): values that are neighbours and no further apart than TOLERANCE count as equal.
  It takes a sort. Tokens are many, and a token that occurs often ties wherever its score happens to be. To choose a
  number of them (`take_best_tokens`) only those that near the last one have to be told apart.
- The experts of a token (`rank_top_k`): values are rounded to whole numbers of a quantum, which takes no sort. Experts
  are few, and equal ones are rare.

What remains: two neighbours that are just TOLERANCE apart, or a value on the boundary of two quanta, within the noise.
That is as rare as two values that happen to be nearer to each other than the noise, which no rule can help.
"""

import torch
from torch import Tensor

TOLERANCE = 2.0**-17
"""Of neighbours in logits or logarithms of scores: 8e-6, ten times the noise, and 0.0008 % of a probability.
Probabilities are ranked by their logarithm, since among many experts they are small and 8e-6 of the whole would be
much. Only among millions of tokens are neighbours so close that runs of them grow together."""

QUANTUM = 2.0**-14
"""Of logits: 6e-5, so that a value is on a boundary in one of a hundred cases or less. Two probabilities whose logits
are so close differ by 0.006 %, sixty times less than one bit of bf16."""

SCORE_QUANTUM = 2.0**-20
"""Of scores that have to be compared as they are, such as those with a selection bias: 1e-6, ten times the noise of a
number below 1. With 256 experts probabilities are some 0.004, and 6e-5 would be much."""


def log_scores(scores: Tensor) -> Tensor:
    """Return the logarithms of scores, to rank them by: finite for 0, so that -inf can mean 'not at all'."""
    return scores.detach().clamp(min=torch.finfo(scores.dtype).tiny).log()


def rounded(value: Tensor, quantum: float = QUANTUM) -> Tensor:
    """Return the values in whole numbers of the quantum, without gradient."""
    return (value.detach() / quantum).round()


def rank_top_k(value: Tensor, k: int, dim: int = -1, quantum: float = QUANTUM) -> Tensor:
    """Return the indices of the k highest values along `dim`, best first; equal quanta in their order, no sort."""
    return _top_k_of_integers(rounded(value, quantum), k, dim)


def rank_all(value: Tensor, dim: int = -1) -> Tensor:
    """Return the indices along `dim` from the highest value to the lowest; near ties in their order."""
    return merge_near_ties(value.detach(), dim)[1].argsort(dim=dim, descending=True, stable=True)


def take_best_tokens(value_GTE: Tensor, num: int, seats_G: Tensor) -> Tensor:
    """Return `num` tokens for each expert of each group, int64 [G, num, E], of which the first `seats_G` are its best.

    These are the tokens above the value of the last seat, and of those within TOLERANCE of it the first ones: a
    selection, for which what is far from the last seat need not be sorted.
    """
    if num == 0:
        return torch.zeros_like(value_GTE[:, :0], dtype=torch.int64)
    last_G11 = (seats_G - 1).clamp(0, num - 1).view(-1, 1, 1)
    value_GTE = value_GTE.detach()
    best_GCE = value_GTE.topk(num, dim=1).values
    last_G1E = best_GCE.gather(1, last_G11.expand(-1, 1, best_GCE.shape[2]))
    above_GTE, near_GTE = value_GTE > last_G1E + TOLERANCE, value_GTE >= last_G1E - TOLERANCE
    return _top_k_of_integers(above_GTE.long() + near_GTE, num, dim=1)


def merge_near_ties(value: Tensor, dim: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Return the values along `dim` with near ties made equal, and their levels (int64: the higher, the higher).

    A level is a run of values whose neighbours are no further apart than `tolerance`; all get that of the lowest.
    """
    if value.shape[dim] < 2:
        return value, torch.zeros_like(value, dtype=torch.int64)
    sorted_values, index = value.sort(dim=dim)
    starts = torch.ones_like(sorted_values, dtype=torch.bool)
    starts.narrow(dim, 1, value.shape[dim] - 1).copy_(sorted_values.diff(dim=dim) > tolerance)
    start = _index_along(value, dim).where(starts, 0).cummax(dim).values
    merged = torch.empty_like(value).scatter_(dim, index, sorted_values.gather(dim, start))
    return merged, torch.empty_like(index).scatter_(dim, index, start)


def _top_k_of_integers(value: Tensor, k: int, dim: int) -> Tensor:
    # torch.topk keeps no order among equals: with the index in it each key is the only one of its kind.
    num = value.shape[dim]
    limit = 2**62 // max(num, 1)
    key = value.clamp(-limit, limit).long() * num - _index_along(value, dim)
    return key.argmax(dim, keepdim=True) if k == 1 else key.topk(k, dim=dim).indices


def _index_along(value: Tensor, dim: int) -> Tensor:
    shape = [1] * value.dim()
    shape[dim] = value.shape[dim]
    return torch.arange(value.shape[dim], device=value.device).view(shape)
