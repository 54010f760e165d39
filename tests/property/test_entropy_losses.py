"""Entropy losses and sequence-wise balance: values by hand, bounds, invariances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, run
from torch import Tensor

from moebench.routing.losses import global_entropy, load_balance, local_entropy, mutual_information, sequence_balance
from moebench.routing.values import LayerRecord, Routing

CERTAIN = 100.0
"""A logit so far above the others that its probability is 1 in fp32."""


def record_of(logits_TE: Tensor, length: int | None = None, valid_T: Tensor | None = None) -> LayerRecord:
    """Route each token to its one best expert."""
    scores_TE = logits_TE.softmax(-1)
    weight_TK, expert_TK = scores_TE.max(-1, keepdim=True)
    routing = Routing.from_top_k(
        expert_TK, weight_TK, num_experts=logits_TE.shape[1], logits_TE=logits_TE, scores_TE=scores_TE
    )
    if valid_T is not None:
        routing = routing.keep(valid_T)
    return LayerRecord(routing=routing, kept=routing, valid_T=valid_T, sequence_length=length)


@pytest.mark.parametrize(
    ("logits_TE", "global_value", "local_value"),
    [
        (torch.zeros(8, 4), 0.0, math.log(4)),  # equal logits: balanced and uncertain
        (CERTAIN * torch.eye(4).repeat(2, 1), 0.0, 0.0),  # balanced and certain: maximal information
        (CERTAIN * torch.eye(4)[:1].expand(8, -1), math.log(4), 0.0),  # collapsed on one expert
        # Two experts share all tokens evenly: H(mean) = ln 2 of ln 4.
        (CERTAIN * torch.eye(4)[:2].repeat(4, 1), math.log(2), 0.0),
        # p = (3/4, 1/4) and (1/4, 3/4): the mean is uniform, each has H = ln 4 - 3/4 ln 3.
        (torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log(), 0.0, math.log(4) - 0.75 * math.log(3)),
    ],
    ids=["equal", "even and certain", "collapsed", "half", "by hand"],
)
def test_entropies_by_hand(logits_TE: Tensor, global_value: float, local_value: float) -> None:
    record = record_of(logits_TE)
    assert global_entropy(record).item() == pytest.approx(global_value, abs=1e-5)
    assert local_entropy(record).item() == pytest.approx(local_value, abs=1e-5)
    assert mutual_information(record).item() == pytest.approx(global_value + local_value, abs=1e-5)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 99))
def test_mutual_information_is_bounded(num_tokens: int, num_experts: int, seed: int) -> None:
    logits_TE = 3 * torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    information = math.log(num_experts) - mutual_information(record_of(logits_TE)).item()
    assert -1e-5 <= information <= math.log(min(num_tokens, num_experts)) + 1e-5  # at most the entropy of the token


def test_sequence_balance_detects_collapse_within_sequences() -> None:
    # Two sequences of two tokens. If each uses one of two experts, the batch is even (1) and each sequence collapsed
    # (E = 2). If each uses both, each sequence is even.
    separate, mixed = (CERTAIN * torch.eye(2)[torch.tensor(order)] for order in ([0, 0, 1, 1], [0, 1, 0, 1]))
    assert load_balance(record_of(separate)).item() == pytest.approx(1)
    assert sequence_balance(record_of(separate, length=2)).item() == pytest.approx(2)
    assert sequence_balance(record_of(mixed, length=2)).item() == pytest.approx(1)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_sequence_balance_is_the_mean_over_sequences(batch: int, length: int, num_experts: int, seed) -> None:
    logits_TE = torch.randn(batch * length, num_experts, generator=torch.Generator().manual_seed(seed))
    each = [load_balance(record_of(part)) for part in logits_TE.split(length)]
    torch.testing.assert_close(sequence_balance(record_of(logits_TE, length)), torch.stack(each).mean())


def test_sequence_balance_weights_sequences_by_valid_tokens() -> None:
    # Three valid tokens in one sequence, one in the other: (3 · a + 1 · b) / 4.
    logits_TE = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    valid_T = torch.tensor([True, True, True, True, False, False])
    first, second = (load_balance(record_of(part)) for part in (logits_TE[:3], logits_TE[3:4]))
    padded = sequence_balance(record_of(logits_TE, 3, valid_T))
    torch.testing.assert_close(padded, (3 * first + second) / 4)


def test_layer_record_has_the_sequence_length() -> None:
    _, record = run(Case("switch").layer(), Tokens.draw(32, length=8), training=True)
    each = [sequence_balance(record_of(part)) for part in record.routing.logits_TE.split(8)]
    torch.testing.assert_close(sequence_balance(record), torch.stack(each).mean())
