"""Dependence of a token's output on later tokens, other sequences, and the order of tokens and experts."""

import dataclasses

import pytest
import torch
from support.case_selection import parametrize_cases
from support.cases import (
    MODES,
    Case,
    Tokens,
    cases_of,
    default_cases,
    list_cases,
    route,
    run,
    tabulate_assignments,
    tabulate_weights,
)

from moebench.experts.capacity import Capacity
from moebench.experts.layer import MoELayer

LENGTH = 16
PROBES = 8
"""Random batches per probe; a leak shows in at least a third of them."""

every_router = pytest.mark.parametrize("case", default_cases(), ids=str)
every_case_in_both_modes = parametrize_cases(cases_of(8), training=MODES)


def has_leak(layer: MoELayer, *, training: bool) -> bool:
    """Return whether changing the second half of the middle sequence of three changes its first half in any probe."""
    past_T = torch.arange(LENGTH, LENGTH + LENGTH // 2)
    future_T = past_T + LENGTH // 2
    for probe in range(PROBES):
        tokens = Tokens.draw(3 * LENGTH, seed=probe, length=LENGTH)
        other = tokens.with_other(future_T, seed=100 + probe)
        y_TD, record = run(layer, tokens, training=training, seed=probe)
        other_TD, other_record = run(layer, other, training=training, seed=probe)
        same_choice = torch.equal(
            tabulate_assignments(record.kept)[past_T], tabulate_assignments(other_record.kept)[past_T]
        )
        if not same_choice or (y_TD[past_T] - other_TD[past_T]).abs().max() > 1e-4:
            return True
    return False


def is_declared_causal(case: Case, *, training: bool) -> bool:
    """Return whether the facts declare the dropless router causal in this mode."""
    in_evaluation = case.facts.causality.in_evaluation
    return case.facts.causality.causal if training or in_evaluation is None else in_evaluation


@every_case_in_both_modes
def test_router_is_as_causal_as_declared(case: Case, training: bool) -> None:
    router = case.router()
    past_T = torch.arange(LENGTH // 2)
    changed = False
    for probe in range(PROBES):
        tokens = Tokens.draw(LENGTH, seed=probe)
        other = tokens.with_other(past_T + LENGTH // 2, seed=100 + probe)
        ours, theirs = (route(router, each, training=training, seed=probe) for each in (tokens, other))
        difference_TE = tabulate_weights(ours)[past_T] - tabulate_weights(theirs)[past_T]
        changed |= bool(difference_TE.abs().max() > 1e-5)
    assert changed is not is_declared_causal(case, training=training), case.facts.causality.reason


@every_case_in_both_modes
def test_dropless_layer_is_as_causal_as_declared(case: Case, training: bool) -> None:
    assert has_leak(case.layer(), training=training) is not is_declared_causal(case, training=training)


@parametrize_cases(cases_of(8), training=MODES, factor=[0.5, 1.0])
def test_layer_with_capacity_is_as_causal_as_declared(case: Case, training: bool, factor: float) -> None:
    layer = case.layer(capacity=Capacity(train=factor, eval=factor))
    if case.facts.causality.is_causal(with_capacity=True) or (not training and case.facts.causality.in_evaluation):
        assert not has_leak(layer, training=training)
    elif case.name == "expert_choice_by_position" and factor == 1.0:
        return  # even loads: nothing is dropped
    elif not case.options:  # a declared leak must exist, with the defaults in one of the modes
        assert any(has_leak(layer, training=mode) for mode in (training, not training))


@parametrize_cases(cases_of(8), training=MODES, slow_values={"training": ["eval"]})
def test_position_order_keeps_token_choice_causal(case: Case, training: bool) -> None:
    if case.facts.causality.causal and case.name != "expert_choice_by_position":  # not causal with a capacity
        layer = case.layer(capacity=Capacity(train=0.5, eval=0.5, drop_order="position"))
        assert not has_leak(layer, training=training)


@parametrize_cases(
    [case for case in list_cases() if case.facts.causality.causal], training=MODES, slow_values={"training": ["train"]}
)
def test_passing_dropped_tokens_keeps_token_choice_causal(case: Case, training: bool) -> None:
    if case.name == "expert_choice_by_position":
        return
    capacity = Capacity(train=0.5, eval=0.5, drop_order="position", overflow="pass")
    assert not has_leak(case.layer(capacity=capacity), training=training)


def reroutable_cases() -> list[Case]:
    """Return the causal routers whose scores rank the next best expert, with at most half of the experts in use.

    Without those that list all pairs (ReLU): experts that a token did not choose have score 0 there.
    """
    cases = [case for case in list_cases() if case.facts.causality.causal and case.facts.makes_scores]
    # Excluded: loads so even that no expert has free slots; routing that does not depend on the tokens.
    cases = [case for case in cases if case.name not in ("expert_threshold", "task_level")]
    cases = [case for case in cases if 2 * case.experts_per_token < case.num_experts]
    return [case for case in cases if route(case.router(), Tokens.draw(1), training=False).token_N.numel() < 8]


def measure_used_share(case: Case) -> float:
    """Return the measured experts per token of a router with random weights over the nominal number."""
    routing = route(case.router(), Tokens.draw(3 * LENGTH, length=LENGTH), training=False)
    return int(routing.load_E.sum()) / (3 * LENGTH * case.experts_per_token)


@parametrize_cases(reroutable_cases(), drop_order=["router", "position"])
def test_probe_detects_the_leak_of_rerouting(case: Case, drop_order) -> None:
    # An early token without a slot goes to an expert that later tokens leave free.
    share = measure_used_share(case)
    capacities = [
        Capacity(eval=factor, drop_order=drop_order, overflow="reroute") for factor in (0.75, 0.75 * share, 0.4 * share)
    ]
    # With even loads the gate of one seed may leave no free slots.
    layers = (case.layer(seed=seed, capacity=capacity) for seed in range(3) for capacity in capacities)
    assert any(has_leak(layer, training=False) for layer in layers)


@pytest.mark.parametrize("drop_order", ["score", "random"])
def test_probe_detects_the_leak_of_other_drop_orders(drop_order) -> None:
    # A later token with a higher weight or rank displaces an earlier one.
    layer = Case("switch").layer(capacity=Capacity(train=0.5, drop_order=drop_order))
    assert has_leak(layer, training=True)


def test_probe_detects_the_leak_of_expert_choice() -> None:
    assert has_leak(Case("expert_choice").layer(), training=True)
    assert has_leak(Case("expert_choice").layer(), training=False)


def test_probe_detects_the_leak_of_gshard_with_a_capacity() -> None:
    # The second choice of an early token queues behind the first choices of later ones.
    layer = Case("gshard", 4).layer(capacity=Capacity(train=0.5, eval=0.5))
    assert has_leak(layer, training=False)


@every_router
def test_batch_dependence_is_as_declared(case: Case) -> None:
    layer = case.layer()
    differs = False
    for probe in range(PROBES):
        tokens = Tokens.draw(4 * LENGTH, seed=probe, length=LENGTH)
        third_T = torch.arange(2 * LENGTH, 3 * LENGTH)
        together_TD, record = run(layer, tokens, training=False)
        alone_TD, alone = run(layer, tokens.take(third_T), training=False)
        same = torch.equal(tabulate_assignments(record.kept)[third_T], tabulate_assignments(alone.kept))
        differs |= not same or bool((together_TD[third_T] - alone_TD).abs().max() > 1e-4)
    assert differs is case.facts.causality.batch_dependent


@parametrize_cases(cases_of(8))
def test_reading_the_sequence_is_as_declared(case: Case) -> None:
    # Routers that depend on other sequences too are not asked: their tokens compete for experts.
    layer, half_T = case.layer(), torch.arange(LENGTH // 2)
    changed = False
    for probe in range(PROBES):
        tokens = Tokens.draw(LENGTH, seed=probe)
        for other_T, own_T in ((half_T, half_T + LENGTH // 2), (half_T + LENGTH // 2, half_T)):
            y_TD, _ = run(layer, tokens, training=False)
            changed_TD, _ = run(layer, tokens.with_other(other_T, seed=100 + probe), training=False)
            changed |= bool((y_TD[own_T] - changed_TD[own_T]).abs().max() > 1e-4)
    causality = case.facts.causality
    assert causality.reads_sequence is (changed and not causality.batch_dependent)


def test_expert_choice_within_sequences_is_batch_independent() -> None:
    layer = Case("expert_choice", options={"group": "sequence"}).layer()
    tokens = Tokens.draw(4 * LENGTH, length=LENGTH)
    together_TD, record = run(layer, tokens, training=False)
    for start in range(0, 4 * LENGTH, LENGTH):
        part_T = torch.arange(start, start + LENGTH)
        alone_TD, _ = run(layer, tokens.take(part_T), training=False)
        torch.testing.assert_close(together_TD[part_T], alone_TD)
        assert (tabulate_assignments(record.kept)[part_T].sum(0) == LENGTH * 2 // 8).all()


def test_expert_choice_ignores_padding() -> None:
    # Each expert of a padded sequence takes its share of the 10 valid tokens, not of 16 positions.
    layer = Case("expert_choice", options={"group": "sequence"}).layer()
    tokens = Tokens.draw(2 * LENGTH, length=LENGTH)
    valid_T = torch.ones(2 * LENGTH, dtype=torch.bool)
    valid_T[10:LENGTH] = False
    padded_TD, _ = run(layer, dataclasses.replace(tokens, valid_T=valid_T), training=False)
    first_TD, _ = run(layer, tokens.take(torch.arange(10), length=10), training=False)
    second_TD, _ = run(layer, tokens.take(torch.arange(LENGTH, 2 * LENGTH)), training=False)
    torch.testing.assert_close(padded_TD[:10], first_TD)
    torch.testing.assert_close(padded_TD[LENGTH:], second_TD)


@parametrize_cases(cases_of(8), factor=[0.5, 1.0])
def test_padding_takes_no_slot(case: Case, factor: float) -> None:
    layer = case.layer(capacity=Capacity(eval=factor))
    tokens = Tokens.draw(32)
    padded = dataclasses.replace(tokens, valid_T=torch.arange(32) < 20)
    y_TD, record = run(layer, tokens.take(torch.arange(20), length=20), training=False)
    padded_TD, padded_record = run(layer, padded, training=False)
    assert padded_record.num_dropped == record.num_dropped
    torch.testing.assert_close(padded_TD[:20], y_TD)


POSITIONAL = (
    *("expert_choice_by_position", "hash_bigram", "hash_position", "hash_future"),
    *("mixture_of_tokens", "lory", "domain_posterior"),
)
"""Routers that depend on a token's position or neighbours: only whole sequences are permuted."""


def equivariant_cases() -> list[Case]:
    """Return the cases whose routing is a function of the token: without those that draw by position."""
    return [case for case in cases_of(8) if not case.facts.causality.draws_in_evaluation]


@parametrize_cases(equivariant_cases())
def test_layer_is_equivariant_to_the_order_of_tokens(case: Case) -> None:
    if case.name in POSITIONAL:
        order_T = torch.cat([torch.arange(LENGTH, 2 * LENGTH), torch.arange(LENGTH)])
    elif case.is_soft or case.options.get("group") == "sequence" or case.name == "sentence_level":
        order_T = torch.cat([LENGTH + torch.randperm(LENGTH), torch.randperm(LENGTH)])
    else:
        order_T = torch.randperm(2 * LENGTH, generator=torch.Generator().manual_seed(2))
    layer, tokens = case.layer(), Tokens.draw(2 * LENGTH, length=LENGTH)
    y_TD, _ = run(layer, tokens, training=False)
    shuffled_TD, _ = run(layer, tokens.take(order_T), training=False)
    torch.testing.assert_close(shuffled_TD, y_TD[order_T])


def test_score_order_is_equivariant_and_position_order_is_not() -> None:
    # Batch prioritized routing ignores positions; first-come-first-served does not.
    order_T = torch.arange(63, -1, -1)
    tokens = Tokens.draw(64)
    for drop_order, same in (("score", True), ("position", False)):
        layer = Case("switch").layer(capacity=Capacity(eval=0.5, drop_order=drop_order))
        y_TD, record = run(layer, tokens, training=False)
        assert record.num_dropped > 0
        shuffled_TD, _ = run(layer, tokens.take(order_T), training=False)
        assert torch.allclose(shuffled_TD, y_TD[order_T], atol=1e-6) is same


def permutable_cases() -> list[Case]:
    """Return the learned routers whose parameters are scalars or have one row per expert.

    Without group-limited selection, whose groups depend on the order of experts.
    """
    cases = [case for case in cases_of(8) if case.facts.learned and "num_groups" not in case.options]
    cases = [case for case in cases if not case.facts.causality.draws_in_evaluation]  # draws depend on the position
    return [case for case in cases if all(p.shape[0] == 8 for p in case.router().parameters() if p.dim())]


@parametrize_cases(permutable_cases())
def test_layer_is_invariant_to_the_order_of_experts(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(32)
    before_TD, _ = run(layer, tokens, training=False)
    order_E = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim():  # scalars are not per expert
                parameter.copy_(parameter[order_E].clone())
    after_TD, _ = run(layer, tokens, training=False)
    torch.testing.assert_close(after_TD, before_TD)
