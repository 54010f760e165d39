"""On whom a token's output depends: later tokens, other sequences, the order of tokens and of experts."""

import dataclasses

import pytest
import torch
from support.cases import (
    MODES,
    Case,
    Tokens,
    cases_of,
    default_cases,
    list_cases,
    parametrize_cases,
    route,
    run,
    tabulate_assignments,
    tabulate_weights,
)

from moebench.experts.capacity import Capacity
from moebench.experts.layer import MoELayer

LENGTH = 16
PROBES = 8
"""Draws of a probe: the leaks looked for show in at least a third of them."""

every_router = pytest.mark.parametrize("case", default_cases(), ids=str)
every_case_in_both_modes = parametrize_cases(cases_of(8), training=MODES)


def leaks(layer: MoELayer, *, training: bool) -> bool:
    """Change the second half of the middle one of three sequences: does its first half notice, in any of 8 draws?"""
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


def declared_causal(case: Case, *, training: bool) -> bool:
    """Return what the facts say of a router without a capacity in one of the modes."""
    in_evaluation = case.facts.causality.in_evaluation
    return case.facts.causality.causal if training or in_evaluation is None else in_evaluation


@every_case_in_both_modes
def test_router_sees_no_future_if_it_says_so(case: Case, training: bool) -> None:
    router = case.router()
    past_T = torch.arange(LENGTH // 2)
    leaked = False
    for probe in range(PROBES):
        tokens = Tokens.draw(LENGTH, seed=probe)
        other = tokens.with_other(past_T + LENGTH // 2, seed=100 + probe)
        ours, theirs = (route(router, each, training=training, seed=probe) for each in (tokens, other))
        difference_TE = tabulate_weights(ours)[past_T] - tabulate_weights(theirs)[past_T]
        leaked |= bool(difference_TE.abs().max() > 1e-5)
    assert leaked is not declared_causal(case, training=training), case.facts.causality.reason


@every_case_in_both_modes
def test_dropless_layer_is_as_causal_as_declared(case: Case, training: bool) -> None:
    assert leaks(case.layer(), training=training) is not declared_causal(case, training=training)


@parametrize_cases(cases_of(8), training=MODES, factor=[0.5, 1.0])
def test_layer_with_capacity_leaks_only_if_declared(case: Case, training: bool, factor: float) -> None:
    layer = case.layer(capacity=Capacity(train=factor, eval=factor))
    if case.facts.causality.is_causal(with_capacity=True) or (not training and case.facts.causality.in_evaluation):
        assert not leaks(layer, training=training)
    elif case.name == "expert_choice_by_position" and factor == 1.0:
        return  # even loads, nothing is dropped
    elif not case.options:  # a declared leak must be a real one, at least with the defaults and in one of the modes
        assert any(leaks(layer, training=mode) for mode in (training, not training))


@every_case_in_both_modes
def test_position_order_keeps_token_choice_causal(case: Case, training: bool) -> None:
    if case.facts.causality.causal and case.name != "expert_choice_by_position":  # any capacity lets it look ahead
        layer = case.layer(capacity=Capacity(train=0.5, eval=0.5, drop_order="position"))
        assert not leaks(layer, training=training)


@parametrize_cases([case for case in list_cases() if case.facts.causality.causal], training=MODES)
def test_passing_keeps_token_choice_causal(case: Case, training: bool) -> None:
    if case.name == "expert_choice_by_position":
        return
    capacity = Capacity(train=0.5, eval=0.5, drop_order="position", overflow="pass")
    assert not leaks(case.layer(capacity=capacity), training=training)


def rerouted_cases() -> list[Case]:
    """Return the causal routers that can say which expert is next best, where most experts are left to go to.

    Not those that list all pairs (ReLU): what a token did not choose has the score 0 there, and no weight to move.
    """
    cases = [case for case in list_cases() if case.facts.causality.causal and case.facts.makes_scores]
    # Loads so even that no expert is free while others are full; a choice that does not look at the tokens.
    cases = [case for case in cases if case.name not in ("expert_threshold", "task_level")]
    cases = [case for case in cases if 2 * case.experts_per_token < case.num_experts]
    return [case for case in cases if route(case.router(), Tokens.draw(1), training=False).token_N.numel() < 8]


def real_share(case: Case) -> float:
    """Return how much of its nominal experts per token a router with drawn weights uses: adaptive ones may differ."""
    routing = route(case.router(), Tokens.draw(3 * LENGTH, length=LENGTH), training=False)
    return int(routing.load_E.sum()) / (3 * LENGTH * case.experts_per_token)


@pytest.mark.parametrize("case", rerouted_cases(), ids=str)
@pytest.mark.parametrize("drop_order", ["router", "position"])
def test_the_probe_finds_the_leak_of_rerouting(case: Case, drop_order) -> None:
    # An early token without a slot goes where later tokens' own choices leave one.
    share = real_share(case)
    capacities = [
        Capacity(eval=factor, drop_order=drop_order, overflow="reroute") for factor in (0.75, 0.75 * share, 0.4 * share)
    ]
    # Where loads are even the gate of one seed may leave no slot to anybody.
    layers = (case.layer(seed=seed, capacity=capacity) for seed in range(3) for capacity in capacities)
    assert any(leaks(layer, training=False) for layer in layers)


@pytest.mark.parametrize("drop_order", ["score", "random"])
def test_the_probe_finds_the_leak_of_other_drop_orders(drop_order) -> None:
    # A later token that wins the slot, by its weight or by the draw, pushes an earlier one out.
    layer = Case("switch").layer(capacity=Capacity(train=0.5, drop_order=drop_order))
    assert leaks(layer, training=True)


def test_the_probe_finds_the_leak_of_expert_choice() -> None:
    assert leaks(Case("expert_choice").layer(), training=True)
    assert leaks(Case("expert_choice").layer(), training=False)


def test_the_probe_finds_the_leak_of_gshard_with_a_capacity() -> None:
    # The second choice of an early token queues behind the first choices of later ones.
    layer = Case("gshard", 4).layer(capacity=Capacity(train=0.5, eval=0.5))
    assert leaks(layer, training=False)


@every_router
def test_sequence_in_a_batch_as_declared(case: Case) -> None:
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


def test_expert_choice_within_sequences_does_not_mix_them() -> None:
    layer = Case("expert_choice", options={"group": "sequence"}).layer()
    tokens = Tokens.draw(4 * LENGTH, length=LENGTH)
    together_TD, record = run(layer, tokens, training=False)
    for start in range(0, 4 * LENGTH, LENGTH):
        part_T = torch.arange(start, start + LENGTH)
        alone_TD, _ = run(layer, tokens.take(part_T), training=False)
        torch.testing.assert_close(together_TD[part_T], alone_TD)
        assert (tabulate_assignments(record.kept)[part_T].sum(0) == LENGTH * 2 // 8).all()


def test_padding_between_sequences_changes_no_expert_choice() -> None:
    # Each expert of a padded sequence takes its share of the 10 valid tokens, not of the 16 places.
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


PLACED = (
    *("expert_choice_by_position", "hash_bigram", "hash_position", "hash_future"),
    *("mixture_of_tokens", "lory", "domain_posterior"),
)
"""Routers that look at a token's place in its sequence or at its neighbours: only whole sequences can change places."""


def equivariant_cases() -> list[Case]:
    """Return the routers whose choice is a function of the token: not those that draw by place."""
    return [case for case in cases_of(8) if not case.facts.causality.draws_in_evaluation]


@pytest.mark.parametrize("case", equivariant_cases(), ids=str)
def test_order_of_tokens_does_not_matter(case: Case) -> None:
    if case.name in PLACED:
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
    # Batch prioritized routing does not care where a token stands; the plain queue does.
    order_T = torch.arange(63, -1, -1)
    tokens = Tokens.draw(64)
    for drop_order, same in (("score", True), ("position", False)):
        layer = Case("switch").layer(capacity=Capacity(eval=0.5, drop_order=drop_order))
        y_TD, record = run(layer, tokens, training=False)
        assert record.num_dropped > 0
        shuffled_TD, _ = run(layer, tokens.take(order_T), training=False)
        assert torch.allclose(shuffled_TD, y_TD[order_T], atol=1e-6) is same


def gated_cases() -> list[Case]:
    """Return the learned routers whose parameters are single numbers or have one row for each expert.

    Not those that choose among groups of neighbours: another order makes other groups.
    """
    cases = [case for case in cases_of(8) if case.facts.learned and "num_groups" not in case.options]
    cases = [case for case in cases if not case.facts.causality.draws_in_evaluation]  # the draws stay with their places
    return [case for case in cases if all(p.shape[0] == 8 for p in case.router().parameters() if p.dim())]


@pytest.mark.parametrize("case", gated_cases(), ids=str)
def test_order_of_experts_does_not_matter(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(32)
    before_TD, _ = run(layer, tokens, training=False)
    order_E = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim():  # not the one scale of all slots
                parameter.copy_(parameter[order_E].clone())
    after_TD, _ = run(layer, tokens, training=False)
    torch.testing.assert_close(after_TD, before_TD)
