from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.tasks.audio.batches import (
    Masking,
    draw_masks,
    evaluation_indices,
    pad_symbols,
    stack_frames,
    train_indices,
)
from moebench.tasks.audio.utterances import Utterances
from moebench.tasks.text.splits import merge_groups


def utterances(num_frames: list[int], domains: list[int] | None = None) -> Utterances:
    start = np.cumsum([0, *num_frames])
    return Utterances(
        frames_NM=np.arange(start[-1] * 2, dtype=np.float16).reshape(-1, 2),
        start_U1=start,
        symbols_N=np.arange(2 * len(num_frames)),
        symbol_start_U1=np.arange(0, 2 * len(num_frames) + 1, 2),
        domain_U=np.array(domains or [0] * len(num_frames)),
    )


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 5))
def test_each_utterance_comes_once_an_epoch(number, batch_size, seed):
    train = utterances([3 + 7 * i % 11 for i in range(number)])
    # `number` steps of `batch_size` utterances are exactly `batch_size` epochs.
    stream = np.concatenate([train_indices(train, batch_size, seed, step) for step in range(number)])
    for epoch in stream.reshape(batch_size, number):
        assert sorted(epoch) == list(range(number))


def test_batches_are_a_function_of_seed_and_step():
    train = utterances([3 + i % 11 for i in range(50)])
    first = [train_indices(train, 8, 0, step).tolist() for step in range(20)]
    again = utterances([3 + i % 11 for i in range(50)])
    assert [train_indices(again, 8, 0, step).tolist() for step in reversed(range(20))] == first[::-1]
    assert [train_indices(train, 8, 1, step).tolist() for step in range(20)] != first
    assert first[:6] != first[6:12]


def test_utterances_of_similar_length_are_batched_together():
    lengths = np.random.default_rng(0).permutation(800).tolist()
    train = utterances(lengths)
    spread = [np.ptp(np.array(lengths)[train_indices(train, 8, 0, step)]) for step in range(100)]
    # 100 batches of 8 in the order of length: 8 neighbours of 800 different lengths are 7 apart.
    assert spread == [7] * 100
    order = [lengths[train_indices(train, 8, 0, step)[0]] for step in range(100)]
    assert order != sorted(order)


def test_an_evaluation_takes_evenly_spaced_utterances_of_each_domain():
    part = utterances([9, 8, 7, 6, 5, 4, 3], domains=[0, 0, 0, 0, 1, 1, 1])
    assert evaluation_indices(part, None).tolist() == [6, 5, 4, 3, 2, 1, 0]
    assert evaluation_indices(part, 2).tolist() == [5, 4, 2, 0]  # of domain 0: places 0 and 2; of domain 1: 0 and 1


def test_joined_frames_by_hand():
    frames_BNM = torch.arange(1.0, 5.0).view(1, 4, 1)
    assert stack_frames(frames_BNM, 2, 0).tolist() == [[[1, 2], [3, 4]]]
    assert stack_frames(frames_BNM, 2, 1).tolist() == [[[0, 1, 2, 3], [2, 3, 4, 0]]]
    # The bands of a frame stay side by side.
    assert stack_frames(torch.arange(4.0).view(1, 2, 2), 2, 0).tolist() == [[[0, 1, 2, 3]]]


def test_symbols_are_padded_with_zeros():
    part = replace(utterances([1, 1]), symbols_N=np.array([0, 4, 2]), symbol_start_U1=np.array([0, 1, 3]))
    assert pad_symbols(part, np.array([1, 0])).tolist() == [[5, 3], [1, 0]]


def test_masks_do_not_exceed_their_maximum_length():
    num_frames_B = np.array([100, 10, 4] * 100)
    masking = Masking(num_band_masks=1, max_bands=3, num_time_masks=1, max_frames=15)
    found_BNM = draw_masks(num_frames_B, 100, 8, masking, (0, 1))
    time_BN, band_BM = found_BNM.all(2), found_BNM.all(1)
    widths = time_BN.sum(1).reshape(100, 3).max(0)
    assert widths.tolist() == [15, 2, 0]  # at most 15, and a fifth of 100, 10, 4
    assert not time_BN[num_frames_B == 10, 10:].any()
    assert set(band_BM.sum(1)) == {0, 1, 2, 3}
    assert (draw_masks(num_frames_B, 100, 8, masking, (0, 1)) == found_BNM).all()
    assert (draw_masks(num_frames_B, 100, 8, masking, (0, 2)) != found_BNM).any()
    assert not draw_masks(num_frames_B, 100, 8, replace(masking, num_band_masks=0, num_time_masks=0), (0, 1)).any()


def test_equal_texts_unite_groups():
    heard = [("a", "yes"), ("b", "no"), ("c", "yes"), ("b", "stop"), ("d", "stop"), ("e", "go")]
    names = merge_groups(heard)
    assert names[0] == names[2]  # "yes"
    assert names[1] == names[3] == names[4]  # b says "no" and "stop", d says "stop"
    assert len(set(names)) == 3
    assert merge_groups([("x", "x"), ("y", "y")]) == ["x", "y"]


@pytest.mark.parametrize("step", [0, 3, 7])
def test_few_utterances_fill_a_large_batch(step):
    index_B = train_indices(utterances([5, 6, 7]), 8, 0, step)
    assert len(index_B) == 8
    assert np.bincount(index_B).max() - np.bincount(index_B).min() <= 2
