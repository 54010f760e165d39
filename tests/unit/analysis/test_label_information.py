"""Information between experts and labels: numbers by hand, scikit-learn's, planted structure, and chance."""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import adjusted_mutual_info_score, mutual_info_score

from moebench.analysis.specialisation.control_routing import route_by_hash, route_randomly
from moebench.analysis.specialisation.given_token import measure_given_token
from moebench.analysis.specialisation.information import (
    Assignments,
    Ints,
    compute_entropy,
    compute_plug_in,
    measure_given,
    measure_information,
)
from moebench.analysis.specialisation.permutations import find_units, permute_sequences, permute_within
from moebench.analysis.specialisation.token_labels import LabelColumn


def assign(expert_T: Ints | list[int], num_experts: int = 4) -> Assignments:
    """Return one expert for each token."""
    expert_N = np.asarray(expert_T)
    token_N = np.arange(len(expert_N))
    return Assignments(token_N=token_N, expert_N=expert_N, num_tokens=len(token_N), num_experts=num_experts)


def all_experts(num_tokens: int, num_experts: int) -> Assignments:
    """Return a routing that other ones take their number of experts per token from: the first of each token."""
    return assign(np.zeros(num_tokens, dtype=np.int64), num_experts)


def top_2(num_tokens: int, num_experts: int) -> Assignments:
    token_N = np.arange(num_tokens).repeat(2)
    expert_N = np.tile([0, 1], num_tokens)
    return Assignments(token_N=token_N, expert_N=expert_N, num_tokens=num_tokens, num_experts=num_experts)


def test_numbers_by_hand() -> None:
    label_T = np.array([0, 0, 1, 1])
    assert compute_entropy(label_T, 2) == 1.0
    assert compute_plug_in(label_T, 2, assign([3, 3, 1, 1])) == (1.0, 1.0)  # the expert is the label: one bit
    assert compute_plug_in(label_T, 2, assign([0, 1, 0, 1])) == (0.0, 1.0)
    # Of label 0, expert 0 twice; of label 1, experts 0 and 1: H(E) = .811 of 3/4 and 1/4, H(E | Y) = (0 + 1) / 2.
    assert compute_plug_in(label_T, 2, assign([0, 0, 0, 1]))[0] == pytest.approx(0.8113 - 0.5, abs=1e-4)


def test_two_experts_per_token_count_as_two_assignments() -> None:
    # Tokens 0 and 1 of label 0 have experts {0, 1}, tokens 2 and 3 of label 1 experts {2, 3}: of the two bits of an
    # assignment's expert one is the label's, and the other one is which of the token's two experts it is.
    routing = Assignments(
        token_N=np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        expert_N=np.array([0, 1] * 2 + [2, 3] * 2),
        num_tokens=4,
        num_experts=4,
    )
    assert routing.expert_entropy == 2.0
    assert routing.token_information == pytest.approx(1.0)  # H(expert) - log2 k
    assert compute_plug_in(np.array([0, 0, 1, 1]), 2, routing)[0] == 1.0


def test_shares_of_a_soft_routing() -> None:
    # Token 0 is half of both experts, token 1 expert 1 alone: H(E) of (1/4, 3/4) minus (1 bit + 0) / 2.
    routing = Assignments(
        token_N=np.array([0, 0, 1]),
        expert_N=np.array([0, 1, 1]),
        share_N=np.array([0.5, 0.5, 1.0]),
        num_tokens=2,
        num_experts=2,
    )
    assert routing.token_information == pytest.approx(0.8113 - 0.5, abs=1e-4)
    assert compute_plug_in(np.array([0, 1]), 2, routing)[0] == pytest.approx(0.8113 - 0.5, abs=1e-4)


def test_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    label_T = generator.integers(0, 12, 600)
    expert_T = np.where(generator.random(600) < 0.3, label_T % 8, generator.integers(0, 8, 600))
    routing = assign(expert_T, 8)
    plug_in, _ = compute_plug_in(label_T, 12, routing)
    assert plug_in == pytest.approx(mutual_info_score(label_T, expert_T) / np.log(2))  # theirs is in nats
    # With sequences of one token, the permutation is the one whose exact mean the adjusted score subtracts.
    measured = measure_information(label_T, 12, routing, permute_sequences(label_T, np.arange(600)), (400, 0))
    adjusted = adjusted_mutual_info_score(label_T, expert_T, average_method="min")
    assert measured.corrected / measured.ceiling == pytest.approx(adjusted, abs=0.003)


@pytest.mark.parametrize("like", [all_experts, top_2])
def test_a_hash_of_the_token_leaves_no_entropy_of_the_expert(like: Callable[[int, int], Assignments]) -> None:
    token_T = np.random.default_rng(1).zipf(1.5, 4000) % 300
    routing = route_by_hash(token_T, 300, like(4000, 16), seed=0)
    measured = measure_information(token_T, 300, routing, permute_sequences(token_T, np.arange(4000) // 40), (20, 0))
    assert measured.of_routing == pytest.approx(1.0)
    assert routing.token_information - measured.corrected == pytest.approx(0.0, abs=1e-9)  # H(expert | token) - log2 k
    assert measured.p == pytest.approx(1 / 21)


def test_random_routing_says_nothing_in_as_many_cases_as_chance_allows() -> None:
    """Of 200 random routings, p <= 0.05 in 5 %, and few are outside the null interval, within 3 SD."""
    label_T = np.random.default_rng(2).zipf(1.3, 600) % 20
    permute = permute_sequences(label_T, np.arange(600) // 30)
    routings = [route_randomly(top_2(600, 8), seed) for seed in range(200)]
    measured = [measure_information(label_T, 20, routing, permute, (39, seed)) for seed, routing in enumerate(routings)]
    outside = [not low <= m.corrected <= high for m in measured for low, high in [m.null_interval]]
    assert 0.05 - 3 * 0.0154 < np.mean([m.p <= 0.05 for m in measured]) < 0.05 + 3 * 0.0154
    assert np.mean(outside) < 0.1 + 3 * 0.0154  # the interval of few permutations is a little too short
    assert abs(np.mean([m.corrected for m in measured])) < 1e-3


def draw_alike(seed: int) -> tuple[Ints, Ints, Ints]:
    """Return labels and experts that are alike inside 40 sequences and independent of each other, and the sequences."""
    generator = np.random.default_rng(seed)
    sequence_T = np.repeat(np.arange(40), 30)
    label_T = generator.integers(0, 4, 40)[sequence_T]
    usual_T = generator.integers(0, 6, 40)[sequence_T]
    return label_T, np.where(generator.random(1200) < 0.5, usual_T, generator.integers(0, 6, 1200)), sequence_T


def test_sequences_that_are_alike_are_no_information() -> None:
    by_sequence, by_token = [], []
    for seed in range(200):
        label_T, expert_T, sequence_T = draw_alike(seed)
        routing = assign(expert_T, 6)
        permute = permute_sequences(label_T, sequence_T)
        by_sequence.append(measure_information(label_T, 4, routing, permute, (39, seed)).p <= 0.05)
        if seed < 20:
            single = permute_within(label_T, np.zeros_like(label_T), np.arange(len(label_T)))
            by_token.append(measure_information(label_T, 4, routing, single, (39, seed)).p <= 0.05)
    assert np.mean(by_sequence) < 0.05 + 3 * 0.0154
    assert np.mean(by_token) > 0.9  # permuted tokens call all of it information


def test_positions_are_permuted_by_rotation() -> None:
    label_T = np.tile(np.arange(8), 50)
    permute = permute_sequences(label_T, np.repeat(np.arange(50), 8))
    other_T = permute(np.random.default_rng(0))
    assert sorted(other_T) == sorted(label_T)
    assert all(set(np.diff(row) % 8) == {1} for row in other_T.reshape(50, 8))
    assert len({row[0] for row in other_T.reshape(50, 8)}) > 1


def test_sequences_of_unequal_length_are_stretched() -> None:
    length_S = np.random.default_rng(0).integers(8, 60, 200)
    within_T = np.concatenate([np.arange(length) for length in length_S])
    label_T = within_T * 4 // np.repeat(length_S, length_S)  # the quarter of the sequence
    permute = permute_sequences(label_T, np.repeat(np.arange(200), length_S))
    share_Y = np.bincount(permute(np.random.default_rng(1))) / len(label_T)
    assert share_Y == pytest.approx(np.bincount(label_T) / len(label_T), abs=0.01)
    by_length = assign((np.repeat(length_S, length_S) > 30).astype(np.int64), 2)
    assert abs(measure_information(label_T, 4, by_length, permute, (20, 0)).corrected) < 1e-3


def draw_topics(seed: int) -> tuple[Ints, Ints, Ints]:
    """Return the topic and the token of each of 200 sequences of 20 tokens; topics prefer tokens of their own."""
    generator = np.random.default_rng(seed)
    sequence_T = np.repeat(np.arange(200), 20)
    topic_T = generator.integers(0, 4, 200)[sequence_T]
    own_T = 10 * topic_T + generator.integers(0, 10, 4000)
    return topic_T, np.where(generator.random(4000) < 0.5, own_T, generator.integers(0, 40, 4000)), sequence_T


def measure_topic(topic_T: Ints, token_T: Ints, sequence_T: Ints, expert_T: Ints) -> tuple[float, float, float]:
    """Return the information about the topic in bits, the same given the token, and its p."""
    routing = assign(expert_T, 8)
    bits = measure_information(topic_T, 4, routing, permute_sequences(topic_T, sequence_T), (30, 0)).corrected
    permute = permute_within(topic_T, token_T, find_units(topic_T, token_T, sequence_T))
    given = measure_given(topic_T, 4, routing, (token_T, 40), permute, (39, 0))
    return bits, given.corrected, given.p


def test_vocabulary_is_no_topic() -> None:
    p_values, remainders = [], []
    for seed in range(100):
        topic_T, token_T, sequence_T = draw_topics(seed)
        generator = np.random.default_rng(seed)
        by_token_V = generator.integers(0, 8, 40)
        noisy_T = np.where(generator.random(4000) < 0.7, by_token_V[token_T], generator.integers(0, 8, 4000))
        bits, given, p = measure_topic(topic_T, token_T, sequence_T, noisy_T)
        assert bits > 0.01
        remainders.append(given)
        p_values.append(p)
    assert abs(np.mean(remainders)) < 0.004
    assert np.mean(np.array(p_values) <= 0.05) < 0.05 + 3 * 0.0218


def test_a_topic_beyond_vocabulary_is_found() -> None:
    topic_T, token_T, sequence_T = draw_topics(0)
    generator = np.random.default_rng(0)
    by_both = generator.integers(0, 8, (4, 40))
    _, given, p = measure_topic(topic_T, token_T, sequence_T, by_both[topic_T, token_T])
    assert given > 0.5
    assert p == pytest.approx(1 / 40)


def draw_parts(seed: int, num_sequences: int = 40) -> tuple[LabelColumn, tuple[Ints, int], Ints, Assignments]:
    """Return quarters of sequences, their tokens, and experts of the token that are alike inside a sequence."""
    generator = np.random.default_rng(seed)
    sequence_T = np.repeat(np.arange(num_sequences), 60)
    part_T = np.tile(np.arange(60) // 15, num_sequences)
    token_T = np.repeat(generator.zipf(1.4, len(part_T) // 5) % 30, 5)  # tokens come in bursts
    by_both = generator.integers(0, 6, (num_sequences, 30))
    expert_T = np.where(
        generator.random(len(part_T)) < 0.5, by_both[sequence_T, token_T], generator.integers(0, 6, len(part_T))
    )
    return (
        LabelColumn(name="position", values=("1", "2", "3", "4"), label_T=part_T),
        (token_T, 30),
        sequence_T,
        assign(expert_T, 6),
    )


def test_sequences_that_are_alike_say_nothing_about_parts_of_them() -> None:
    by_unit, by_token = [], []
    for seed in range(40):
        column, tokens, sequence_T, routing = draw_parts(seed)
        given = measure_given_token(column, routing, tokens, sequence_T, (39, seed))
        assert given is not None
        by_unit.append(given.p <= 0.05)
        single = permute_within(column.label_T, tokens[0], np.arange(len(sequence_T)))
        by_token.append(measure_given(column.label_T, 4, routing, tokens, single, (39, seed)).p <= 0.05)
    assert np.mean(by_unit) <= 0.07
    assert np.mean(by_token) > 0.2


def test_what_a_small_sample_cannot_tell_is_left_out() -> None:
    column, tokens, sequence_T, routing = draw_parts(0, num_sequences=31)
    assert measure_given_token(column, routing, tokens, sequence_T, (19, 0)) is None
    column, (token_T, _), sequence_T, routing = draw_parts(0)
    rare = np.arange(len(token_T)) // 5  # all occurrences of a token follow each other
    assert measure_given_token(column, routing, (rare, len(rare)), sequence_T, (19, 0)) is None
    hashed = assign(token_T % 6, 6)  # the token determines the expert: nothing is left, whatever the sample
    given = measure_given_token(column, hashed, (token_T, 30), sequence_T * 0, (19, 0))
    assert given is not None
    assert given.corrected == pytest.approx(0)


def test_the_estimate_is_less_biased_than_the_sample() -> None:
    """800 labels, 4,000 tokens: the truth is 0.56 bits, the sample says about twice that."""
    generator = np.random.default_rng(5)
    share_Y = 1 / np.arange(1, 801)
    share_Y /= share_Y.sum()
    chance_YE = np.exp(generator.normal(size=(800, 8)))
    chance_YE /= chance_YE.sum(1, keepdims=True)
    joint_YE = share_Y[:, None] * chance_YE
    truth = float((joint_YE * np.log2(joint_YE / share_Y[:, None] / joint_YE.sum(0))).sum())
    label_T = generator.choice(800, 4000, p=share_Y)
    expert_T = (generator.random((4000, 1)) > chance_YE.cumsum(1)[label_T]).sum(1)
    measured = measure_information(
        label_T, 800, assign(expert_T, 8), permute_sequences(label_T, np.arange(4000)), (20, 0)
    )
    assert measured.plug_in - truth > 0.3
    assert abs(measured.corrected - truth) < 0.05


def test_one_expert_and_labels_of_single_tokens_say_nothing() -> None:
    label_T = np.arange(50)
    permute = permute_sequences(label_T, np.arange(50))
    alone = measure_information(label_T, 50, assign(np.zeros(50, dtype=np.int64)), permute, (5, 0))
    assert (alone.corrected, alone.of_label, alone.of_routing, alone.p) == (0, 0, 0, 1)
    unique = measure_information(label_T, 50, assign(label_T % 4), permute, (5, 0))
    assert unique.corrected == 0  # every permutation determines the experts as well
