"""Histograms of routers that follow quantiles: the order of bins, their width, and values read from counts."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.routing.histogram import SIDE, bin_of, count_by_expert, middle_of, value_below_top


def test_bins_are_in_order_and_fine_near_0() -> None:
    margins = torch.cat([-torch.logspace(2.4, -8, 2000), torch.zeros(1), torch.logspace(-8, 2.4, 2000)])
    bins = bin_of(margins)
    assert (bins.diff() >= 0).all()
    assert bins[0] >= 0
    assert bins[-1] <= 2 * SIDE
    assert bins[2000] == SIDE
    middles = middle_of(bins)
    large = margins.abs() > 1e-7
    assert (middles[large] / margins[large] - 1).abs().max() <= 1 / 128
    assert middles[~large].abs().max() < 2e-7


@given(st.lists(st.floats(-200, 200, width=32), min_size=1, max_size=40), st.integers(0, 39))
def test_the_value_below_the_top_is_that_of_the_sorted_list(values: list[float], number: int) -> None:
    value_T1 = torch.tensor(values).unsqueeze(-1)
    number = min(number, len(values) - 1)
    expected = sorted(values, reverse=True)[number]
    found = value_below_top(count_by_expert(value_T1, None), torch.tensor([number])).item()
    assert abs(found - expected) <= abs(expected) / 128 + 2**-24


def test_counts_of_parts_add_up_and_padding_does_not_count() -> None:
    value_TE = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    valid_T = torch.arange(64) % 3 > 0
    whole = count_by_expert(value_TE[valid_T], None)
    parts = [count_by_expert(value_TE[part], valid_T[part]) for part in (slice(0, 20), slice(20, 64))]
    assert torch.equal(whole, parts[0] + parts[1])
    assert (whole.sum(-1) == valid_T.sum()).all()


def test_numbers_beyond_the_last_bin_are_in_it() -> None:
    assert bin_of(torch.tensor([-1e30, 1e30])).tolist() == [0, 2 * SIDE]
    assert bin_of(torch.tensor([1e-30, -1e-30, 0.0])).tolist() == [SIDE] * 3
