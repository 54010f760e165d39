"""Interpolated n-grams equal a slow count with dictionaries, and numbers worked by hand."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.tasks.baselines import ngrams
from moebench.tasks.baselines.ngrams import LEFT, MISSING, TWO_SIDED, NgramModel, max_order, read_context

TEXTS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def count_slowly(text: Sequence[int], offsets: Sequence[int]) -> list[dict[tuple[int, ...], Counter[int]]]:
    """Return for each order: context, the nearest symbol first -> counts of the symbols at its centre."""
    orders: list[dict[tuple[int, ...], Counter[int]]] = [defaultdict(Counter) for _ in range(len(offsets) + 1)]
    for position, symbol in enumerate(text):
        for number in range(len(offsets) + 1):
            places = [position + offset for offset in offsets[:number]]
            if all(0 <= place < len(text) for place in places):
                orders[number][tuple(text[place] for place in places)][symbol] += 1
    return orders


def predict_slowly(
    orders: Sequence[dict[tuple[int, ...], Counter[int]]], symbol: int, context: Sequence[int], num_symbols: int
) -> list[float]:
    """Return the probability of a symbol by each order, with Witten-Bell smoothing."""
    p, values = 1 / num_symbols, []
    for number, counts in enumerate(orders):
        if number <= len(context):
            seen = counts.get(tuple(context[:number]), Counter())
            if seen:
                p = (seen[symbol] + len(seen) * p) / (seen.total() + len(seen))
        values.append(p)
    return values


def test_numbers_worked_by_hand():
    model = NgramModel(np.array([0, 0, 1]), num_symbols=2, offsets=(-1,))
    target_N, before_N = np.array([0, 1, 0, 1]), np.array([MISSING, 0, 1, 0])
    p_ON = np.exp(-model.compute_nats(target_N, [before_N]))
    # order 1: 0 twice, 1 once, two different ones: (2 + 2 · 1/2) / (3 + 2) and (1 + 2 · 1/2) / (3 + 2)
    assert p_ON[0] == pytest.approx([0.6, 0.4, 0.6, 0.4])
    # order 2 after 0: 0 once, 1 once: (1 + 2 · .4) / (2 + 2); nothing follows 1, and nothing precedes the first
    assert p_ON[1] == pytest.approx([0.6, 0.45, 0.6, 0.45])


@pytest.mark.parametrize("offsets", [LEFT, TWO_SIDED, (-1,), ()])
@given(train=TEXTS, text=TEXTS)
def test_probabilities_equal_a_slow_count(offsets: tuple[int, ...], train: list[int], text: list[int]):
    symbol_N, position_N = np.array(text), np.arange(len(text))
    length_N = np.full(len(text), len(text))
    contexts = [read_context(symbol_N, position_N, length_N, offset) for offset in offsets]
    p_ON = np.exp(-NgramModel(np.array(train), 4, offsets).compute_nats(symbol_N, contexts))
    orders = count_slowly(train, offsets)
    for position, symbol in enumerate(text):
        places = [position + offset for offset in offsets]
        known = [text[place] if 0 <= place < len(text) else None for place in places]
        context = [place for place in known[: known.index(None)] if place is not None] if None in known else known
        assert p_ON[:, position] == pytest.approx(predict_slowly(orders, symbol, context, 4), rel=1e-12)


@given(train=TEXTS, context=st.lists(st.integers(-1, 3), min_size=4, max_size=4))
def test_probabilities_of_all_symbols_add_up_to_1(train: list[int], context: list[int]):
    columns = [np.full(4, symbol) for symbol in context]
    p_O4 = np.exp(-NgramModel(np.array(train), 4).compute_nats(np.arange(4), columns))
    assert p_O4.sum(1) == pytest.approx(np.ones(5), rel=1e-12)


def test_counting_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    text = np.random.default_rng(0).integers(0, 5, 200)
    contexts = [read_context(text, np.arange(200), np.full(200, 200), offset) for offset in TWO_SIDED]
    complete = NgramModel(text, 5, TWO_SIDED).compute_nats(text, contexts)
    monkeypatch.setattr(ngrams, "CHUNK", 7)
    assert (NgramModel(text, 5, TWO_SIDED).compute_nats(text, contexts) == complete).all()


def test_an_order_must_fit_into_63_bits():
    assert max_order(257, 5) == 5  # 258^5 = 1.1e12
    assert max_order(4097, 5) == 5  # 4098^5 = 1.2e18
    assert max_order(128_000, 5) == 3  # 128,001^3 = 2.1e15, ^4 = 2.7e20
    with pytest.raises(ValueError, match="63 bits"):
        NgramModel(np.array([0]), 128_000)


def test_an_unseen_symbol_and_an_empty_text():
    # counts of 0, 0: p(1) = (0 + 1 · 1/2) / (2 + 1)
    assert NgramModel(np.array([0, 0]), 2, ()).compute_nats(np.array([1]), [])[0] == pytest.approx(math.log(6))
    assert NgramModel(np.empty(0, np.int64), 2).compute_nats(np.array([1]), [np.array([0])] * 4) == pytest.approx(
        np.full((5, 1), math.log(2))
    )
