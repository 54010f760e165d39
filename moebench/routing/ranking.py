"""Ranking that does not depend on the order of a sum: near ties are ties, and ties go to the lower index.

A batch that is divided among processes is summed in another order, so the same value differs in its last bits: fp32
logits of size 1 to 10 by some 1e-7 to 1e-6. Where two values are equal but for that (the same token twice, two experts
with the same weights), comparing them as they are lets the noise decide who is chosen, and from there on two meshes
train two models. Every choice among tokens or experts therefore goes through this module: it compares values in whole
numbers of a quantum, and gives equal ones to the lower index.

What remains: a value that stands on the boundary between two quanta within its noise, and two different values that
happen to be as near to each other as that. Both are as rare as the noise is small against the quantum, or against the
distance of values; no quantum can help the second.
"""

import torch
from torch import Tensor

QUANTUM = 2.0**-14
"""For logits and logarithms of scores: 6e-5, a hundred times the noise of fp32 logits. Two probabilities whose
logarithms are that close differ by 0.006 %, sixty times less than one bit of bf16. Probabilities are ranked by their
logarithm, since among many experts, or tokens, they are small and 6e-5 of the whole would be much."""

SCORE_QUANTUM = 2.0**-20
"""For scores that have to be compared as they are, such as those with a selection bias: 1e-6, ten times the noise of a
number below 1. Between 256 experts probabilities are some 0.004, and next ones differ by 1e-4 or less."""


def rounded(value: Tensor, quantum: float = QUANTUM) -> Tensor:
    """Return the values in whole numbers of the quantum, without gradient."""
    return (value.detach() / quantum).round()


def log_scores(scores: Tensor) -> Tensor:
    """Return the logarithms of scores, to rank them by: finite for 0, so that -inf can mean 'not at all'."""
    return scores.detach().clamp(min=torch.finfo(scores.dtype).tiny).log()


def rank_all(value: Tensor, dim: int = -1) -> Tensor:
    """Return the indices along `dim` from the highest value to the lowest; equal ones in their order."""
    return rounded(value).argsort(dim=dim, descending=True, stable=True)


def rank_top_k(value: Tensor, k: int, dim: int = -1, quantum: float = QUANTUM) -> Tensor:
    """Return the indices of the k highest values along `dim`, from the best to the worst; equal ones in their order.

    `torch.topk` keeps no order among equals, and a stable sort of everything takes several times as long: each value
    becomes a whole number that no other has, its quanta times n less its index. (-inf is a value like any other.)
    """
    num = value.shape[dim]
    shape = [1] * value.dim()
    shape[dim] = num
    limit = 2.0**62 / max(num, 1)
    key = rounded(value, quantum).clamp(-limit, limit).long() * num
    key -= torch.arange(num, device=value.device).view(shape)
    return key.argmax(dim, keepdim=True) if k == 1 else key.topk(k, dim=dim).indices
