"""Histograms whose counts add up over micro-batches and processes, in bins that get finer towards 0.

A quantile of a whole step cannot be had from those of its parts, but from the sum of their histograms it can. Routers
that follow a quantile count how far numbers are from where it was last: it is then resolved the better the less it
moves, however close together the numbers lie.
"""

import torch
from torch import Tensor

BINS_PER_OCTAVE = 64
"""A number is known to 1 part in 128."""
SMALLEST, LARGEST = -24, 8
"""Powers of 2 between which numbers are told apart: below lies the rounding of fp32 numbers near 1."""
SIDE = (LARGEST - SMALLEST) * BINS_PER_OCTAVE
"""Bins for numbers of one sign; one more in the middle is for those below 2**SMALLEST."""


def bin_of(value: Tensor) -> Tensor:
    """Return the bin of each number, int64 from 0 (the lowest) to 2 SIDE; SIDE is that of 0."""
    mantissa, exponent = torch.frexp(value.abs())  # a mantissa from 1/2 to below 1
    within = ((2 * mantissa - 1) * BINS_PER_OCTAVE).long()
    distance = (exponent.long() - 1 - SMALLEST) * BINS_PER_OCTAVE + within + 1
    return SIDE + value.sign().long() * distance.clamp(0, SIDE)


def middle_of(number: Tensor) -> Tensor:
    """Return the number in the middle of each bin, fp64."""
    signed = number - SIDE
    distance = (signed.abs() - 1).clamp(min=0)
    octave, within = distance // BINS_PER_OCTAVE, distance % BINS_PER_OCTAVE
    size = (1 + (within.double() + 0.5) / BINS_PER_OCTAVE) * torch.exp2(octave.double() + SMALLEST)
    return signed.sign() * size


def empty_counts(num_experts: int, device: torch.device) -> Tensor:
    """Return histograms of nothing, int64 [E, bins]."""
    return torch.zeros(num_experts, 2 * SIDE + 1, dtype=torch.int64, device=device)


def count_by_expert(value_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Return the histogram of each column, int64 [E, bins], padding left out."""
    bin_TE = bin_of(value_TE)
    one_TE = torch.ones_like(bin_TE)
    if valid_T is not None:
        one_TE = one_TE * valid_T.unsqueeze(-1)
    return empty_counts(value_TE.shape[1], value_TE.device).scatter_add(1, bin_TE.T, one_TE.T)


def value_below_top(count_EH: Tensor, number: Tensor) -> Tensor:
    """Return the largest value of each row that is not among its `number` (scalar or [E]) largest, fp64 [E]."""
    above_EH = count_EH.flip(-1).cumsum(-1)
    bins_above_E = (above_EH <= number.unsqueeze(-1)).sum(-1).clamp(max=2 * SIDE)
    return middle_of(2 * SIDE - bins_above_E)
