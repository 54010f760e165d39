"""Histograms for quantile tracking: order and width of bins, values read from counts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.routing.histogram import BINS_PER_SIGN, count_by_expert, find_value_below_top, to_bin, to_bin_center


def test_bins_are_ordered_and_finer_near_0() -> None:
    margins = torch.cat([-torch.logspace(2.4, -8, 2000), torch.zeros(1), torch.logspace(-8, 2.4, 2000)])
    bins = to_bin(margins)
    assert (bins.diff() >= 0).all()
    assert bins[0] >= 0
    assert bins[-1] <= 2 * BINS_PER_SIGN
    assert bins[2000] == BINS_PER_SIGN
    centers = to_bin_center(bins)
    large = margins.abs() > 1e-7
    assert (centers[large] / margins[large] - 1).abs().max() <= 1 / 128
    assert centers[~large].abs().max() < 2e-7


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40), st.integers(0, 39))
def test_value_below_top_matches_sorted_list(values: list[float], num_top: int) -> None:
    value_T1 = torch.tensor(values).unsqueeze(-1)
    num_top = min(num_top, len(values) - 1)
    expected = sorted(values, reverse=True)[num_top]
    value = find_value_below_top(count_by_expert(value_T1, None), torch.tensor([num_top])).item()
    assert abs(value - expected) <= abs(expected) / 128 + 2**-24


def test_counts_add_up_over_parts_without_padding() -> None:
    value_TE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    valid_T = torch.arange(64) % 3 > 0
    total_EH = count_by_expert(value_TE[valid_T], None)
    parts = [count_by_expert(value_TE[part], valid_T[part]) for part in (slice(0, 20), slice(20, 64))]
    assert torch.equal(total_EH, parts[0] + parts[1])
    assert (total_EH.sum(-1) == valid_T.sum()).all()


def test_values_out_of_range_fall_into_the_last_bin() -> None:
    assert to_bin(torch.tensor([-1e30, 1e30])).tolist() == [0, 2 * BINS_PER_SIGN]
    assert to_bin(torch.tensor([1e-30, -1e-30, 0.0])).tolist() == [BINS_PER_SIGN] * 3
