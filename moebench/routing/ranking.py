"""Rankings that do not depend on the order of a summation: near ties count as ties, and ties go to the lower index.

A batch that is divided among processes is summed in another order, which changes the last bits of a result: fp32 logits
by some 1e-7. Where two values are equal but for such noise (the same token twice, two experts with equal weights), a
plain comparison lets the noise decide, and two meshes then train two different models. Every choice among tokens or
experts therefore goes through this module, in one of two ways.

- Among tokens (`rank_all`, `merge_near_ties`): sorted neighbours no further apart than TOLERANCE count as equal. This
needs a sort, because tokens are many and equal tokens tie at any score. Selecting a number of tokens
(`take_best_tokens`) only has to resolve ties near the last one selected.
- Among the experts of a token (`rank_top_k`): values are rounded to multiples of a quantum, which needs no sort.
Experts are few and equal ones are rare.

Not covered: neighbours exactly TOLERANCE apart, or a value exactly on a rounding boundary, within the noise. They are
as rare as distinct values closer than the noise, which no rule can resolve.
"""

import torch
from torch import Tensor

TOLERANCE = 2.0**-17
"""For neighbouring logits or log scores: 8e-6, ten times the noise, and 0.0008 % of a probability. Probabilities are
ranked by their logarithm, because among many experts they are small and an absolute 8e-6 would be large. Runs of
neighbours only grow together among millions of tokens."""

QUANTUM = 2.0**-14
"""For logits: 6e-5, so that at most one value in a hundred is near a rounding boundary. Probabilities whose logits
differ by this much differ by 0.006 %, sixty times less than one bit of bf16."""

SCORE_QUANTUM = 2.0**-20
"""For scores that must be compared on a linear scale, such as scores plus a selection bias: 1e-6, ten times the noise
of values below 1. With 256 experts probabilities are about 0.004, for which 6e-5 would be too coarse."""


def log_scores(scores: Tensor) -> Tensor:
    """Return the logarithms of scores for ranking, without gradient; finite for 0, so that -inf can mean 'excluded'."""
    return scores.detach().clamp(min=torch.finfo(scores.dtype).tiny).log()


def round_to_quantum(value: Tensor, quantum: float = QUANTUM) -> Tensor:
    """Round values to integer multiples of the quantum; returns the multiples, without gradient."""
    return (value.detach() / quantum).round()


def rank_top_k(value: Tensor, k: int, dim: int = -1, quantum: float = QUANTUM) -> Tensor:
    """Return the indices of the k highest rounded values along `dim`, best first; ties in index order."""
    return _top_k_of_integers(round_to_quantum(value, quantum), k, dim)


def rank_all(value: Tensor, dim: int = -1) -> Tensor:
    """Return the indices along `dim` from the highest to the lowest value; near ties in index order."""
    return merge_near_ties(value.detach(), dim)[1].argsort(dim=dim, descending=True, stable=True)


def take_best_tokens(value_GTE: Tensor, num: int, capacity_G: Tensor) -> Tensor:
    """Return `num` tokens for each expert of each group, int64 [G, num, E], the best `capacity_G` of them first.

    Selects the tokens above the value of the last slot, then those within TOLERANCE of it in index order. Values far
    from the last slot need not be sorted.
    """
    if num == 0:
        return torch.zeros_like(value_GTE[:, :0], dtype=torch.int64)
    last_G11 = (capacity_G - 1).clamp(0, num - 1).view(-1, 1, 1)
    value_GTE = value_GTE.detach()
    best_GCE = value_GTE.topk(num, dim=1).values
    last_G1E = best_GCE.gather(1, last_G11.expand(-1, 1, best_GCE.shape[2]))
    above_GTE, near_GTE = value_GTE > last_G1E + TOLERANCE, value_GTE >= last_G1E - TOLERANCE
    return _top_k_of_integers(above_GTE.long() + near_GTE, num, dim=1)


def merge_near_ties(value: Tensor, dim: int, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Return the values along `dim` with near ties made equal, and their levels (int64, ascending with the value).

    A level is a run of sorted values whose neighbours are at most `tolerance` apart; all take its lowest value.
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
    # torch.topk does not order ties: including the index makes every key unique.
    size = value.shape[dim]
    limit = 2**62 // max(size, 1)
    key = value.clamp(-limit, limit).long() * size - _index_along(value, dim)
    return key.argmax(dim, keepdim=True) if k == 1 else key.topk(k, dim=dim).indices


def _index_along(value: Tensor, dim: int) -> Tensor:
    shape = [1] * value.dim()
    shape[dim] = value.shape[dim]
    return torch.arange(value.shape[dim], device=value.device).view(shape)
