"""Windows of long texts and batches of windows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.analysis.benchmarks.windows import Window, is_truncated, iter_batches, pair_windows, split_windows


def test_each_token_is_predicted_once() -> None:
    """The example of lm-eval's documentation: ten tokens, four at a time."""
    windows = split_windows(-1, range(10), 4)
    assert [(list(inputs), list(targets)) for inputs, targets in windows] == [
        ([-1, 0, 1, 2], [0, 1, 2, 3]),
        ([3, 4, 5, 6], [4, 5, 6, 7]),
        ([5, 6, 7, 8], [8, 9]),
    ]
    assert split_windows(-1, [], 4) == []


@given(st.integers(0, 60), st.integers(1, 20))
def test_windows_are_those_of_lm_eval(length: int, limit: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(length))
    pairs = [*map(utils.make_disjoint_window, utils.get_rolling_token_windows(tokens, -1, limit, 1))]
    expected = [([*before, *targets[:-1]], targets) for before, targets in pairs]
    assert [(list(inputs), list(targets)) for inputs, targets in split_windows(-1, tokens, limit)] == expected


def test_a_context_is_shortened_from_the_left() -> None:
    assert pair_windows([1, 2, 3], [4, 5], 8) == [([1, 2, 3, 4], [4, 5])]
    assert pair_windows([1, 2, 3], [4, 5], 3) == [([2, 3, 4], [4, 5])]
    assert pair_windows([1, 2, 3], [4, 5], 2) == [([3, 4], [4, 5])]
    assert [(list(a), list(b)) for a, b in pair_windows([1, 2, 3], [4, 5, 6], 2)] == [([3, 4], [4, 5]), ([4, 5], [6])]
    assert not is_truncated([1, 2, 3], [4, 5], 4)
    assert is_truncated([1, 2, 3], [4, 5], 3)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 8), st.integers(1, 200))
def test_batches_have_every_window_once_and_bounded_sizes(lengths: list[int], size: int, positions: int) -> None:
    windows = [Window(inputs=(0,) * length, targets=(0,)) for length in lengths]
    batches = list(iter_batches(windows, size, positions))
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * longest <= positions
