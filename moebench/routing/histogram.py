"""Histograms whose counts add up over micro-batches and processes, with bins that get finer towards 0.

The quantile of a whole step cannot be computed from the quantiles of its parts, but it can from the sum of their
histograms. Routers that track a quantile count distances from its previous value: the less it moves, the finer the bins
that resolve it, however close together the values are.
"""

import torch
from torch import Tensor

BINS_PER_OCTAVE = 64
"""Bins between two powers of 2: relative resolution 1/128."""
MIN_EXPONENT, MAX_EXPONENT = -24, 8
"""Powers of 2 that bound the resolved range; 2**-24 is the rounding error of fp32 values near 1."""
BINS_PER_SIGN = (MAX_EXPONENT - MIN_EXPONENT) * BINS_PER_OCTAVE
"""Bins of each sign; one more bin in the middle counts values below 2**MIN_EXPONENT."""


def to_bin(value: Tensor) -> Tensor:
    """Return the bin of each value, int64 from 0 (lowest) to 2 BINS_PER_SIGN; bin BINS_PER_SIGN holds 0."""
    mantissa, exponent = torch.frexp(value.abs())  # the mantissa is in [1/2, 1)
    bin_in_octave = ((2 * mantissa - 1) * BINS_PER_OCTAVE).long()
    distance = (exponent.long() - 1 - MIN_EXPONENT) * BINS_PER_OCTAVE + bin_in_octave + 1
    return BINS_PER_SIGN + value.sign().long() * distance.clamp(0, BINS_PER_SIGN)


def to_bin_center(bin_index: Tensor) -> Tensor:
    """Return the value at the center of each bin, fp64."""
    signed = bin_index - BINS_PER_SIGN
    distance = (signed.abs() - 1).clamp(min=0)
    octave, bin_in_octave = distance // BINS_PER_OCTAVE, distance % BINS_PER_OCTAVE
    size = (1 + (bin_in_octave.double() + 0.5) / BINS_PER_OCTAVE) * torch.exp2(octave.double() + MIN_EXPONENT)
    return signed.sign() * size


def empty_histograms(num_experts: int, device: torch.device) -> Tensor:
    """Return histograms without counts, int64 [E, bins]."""
    return torch.zeros(num_experts, 2 * BINS_PER_SIGN + 1, dtype=torch.int64, device=device)


def count_by_expert(value_TE: Tensor, valid_T: Tensor | None) -> Tensor:
    """Count each column in a histogram, without padding; int64 [E, bins]."""
    bin_TE = to_bin(value_TE)
    one_TE = torch.ones_like(bin_TE)
    if valid_T is not None:
        one_TE = one_TE * valid_T.unsqueeze(-1)
    return empty_histograms(value_TE.shape[1], value_TE.device).scatter_add(1, bin_TE.T, one_TE.T)


def find_value_below_top(count_EH: Tensor, num_top: Tensor) -> Tensor:
    """Return the largest value of each row that is not among its `num_top` (scalar or [E]) largest, fp64 [E]."""
    cumulative_EH = count_EH.flip(-1).cumsum(-1)
    bins_above_E = (cumulative_EH <= num_top.unsqueeze(-1)).sum(-1).clamp(max=2 * BINS_PER_SIGN)
    return to_bin_center(2 * BINS_PER_SIGN - bins_above_E)
