import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moebench.tasks.text.shuffling import order_by_cipher
from moebench.tasks.text.token_stream import TokenStream
from moebench.tasks.text.windows import TextSplit


def parts_of(lengths: list[int]) -> list[np.ndarray]:
    """Return arrays of these lengths, numbered through."""
    numbers = np.arange(sum(lengths), dtype=np.uint16)
    return np.split(numbers, np.cumsum(lengths)[:-1])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=8), st.integers(1, 7), st.data())
def test_a_stream_reads_like_the_concatenated_arrays(lengths, length, data):
    parts = parts_of(lengths)
    complete, stream = np.concatenate(parts), TokenStream(parts)
    assert len(stream) == len(complete)
    assert np.concatenate([np.empty(0), *stream.chunks(2)]).tolist() == complete.tolist()
    first, end = sorted(data.draw(st.tuples(st.integers(0, len(complete)), st.integers(0, len(complete) + 3))))
    assert stream.read(first, end).tolist() == complete[first:end].tolist()
    if len(complete) >= length:
        starts = data.draw(st.lists(st.integers(0, len(complete) - length), max_size=5))
        rows = stream.gather(np.array(starts, dtype=np.int64), length)
        assert rows.tolist() == [complete[start : start + length].tolist() for start in starts]
        assert rows.dtype == np.int64


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=4),
    st.integers(1, 5),
)
def test_windows_over_parts_tile_each_domain(lengths_D, sequence_length):
    # Oracle: each domain as one list, cut every L tokens as long as L + 1 are left.
    parts_D = [parts_of(lengths) if sum(lengths) else [] for lengths in lengths_D]
    streams_D = [np.concatenate([np.empty(0, dtype=np.int64), *parts]).tolist() for parts in parts_D]
    expected = [
        (domain, stream[start : start + sequence_length + 1])
        for domain, stream in enumerate(streams_D)
        for start in range(0, len(stream) - sequence_length, sequence_length)
    ]
    split = TextSplit(
        tokens=TokenStream([part for parts in parts_D for part in parts]),
        bytes=np.arange(100),  # of each id: the id itself
        length_D=np.array([len(stream) for stream in streams_D]),
        sequence_length=sequence_length,
    )
    bounds = [(domain, split.tokens.read(start, end).tolist()) for domain, start, end in split.list_domains()]
    assert bounds == [(domain, stream) for domain, stream in enumerate(streams_D) if stream]
    index_W = np.arange(split.num_windows)
    assert split.domain_of(index_W).tolist() == [domain for domain, _ in expected]
    if expected:
        tokens_WM, bytes_WM = split.window(index_W)
        assert tokens_WM.tolist() == bytes_WM.tolist() == [tokens for _, tokens in expected]


@given(st.integers(1, 300), st.integers(0, 2**63), st.integers(0, 5))
def test_the_cipher_is_a_bijection(num_windows, seed, epoch):
    index_N = order_by_cipher(num_windows, seed, epoch, np.arange(num_windows))
    assert sorted(index_N.tolist()) == list(range(num_windows))
    assert index_N.dtype == np.int64


def test_the_cipher_needs_no_table_and_has_an_order_for_each_epoch():
    position_N = np.arange(1000)
    orders = [order_by_cipher(10**11, seed, epoch, position_N) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order.tolist()) for order in orders}) == 4
    for order in orders:
        assert len(np.unique(order)) == 1000
        # Uniform over the windows: the mean of 1,000 draws has a standard error of 0.9 %.
        assert abs(order.mean() / 10**11 - 0.5) < 0.04


def test_the_cipher_gives_each_position_each_window_equally_often():
    # 3,000 seeds, 5 windows: 600 of each at every position, standard deviation 22.
    index = np.array([order_by_cipher(5, seed, 0, np.arange(5)) for seed in range(3000)])
    counts = np.array([np.bincount(column, minlength=5) for column in index.T])
    assert abs(counts - 600).max() < 120
