"""Identities between routers."""

import pytest
import torch
from support.case_selection import parametrize_cases
from support.cases import Case, Tokens, cases_of, run

from moebench.experts.capacity import Capacity
from moebench.experts.layer import MoELayer


def pair_of_layers(first: Case, second: Case, **options: Capacity) -> tuple[MoELayer, MoELayer]:
    """Build two layers with the same gate and experts."""
    layers = first.layer(**options), second.layer()
    layers[1].bank.load_state_dict(layers[0].bank.state_dict())
    for ours, theirs in zip(layers[0].router.parameters(), layers[1].router.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    return layers


def assert_layers_agree(first: MoELayer, second: MoELayer, *, exactly: bool, training: bool = True) -> None:
    """Compare outputs and every gradient."""
    tokens = Tokens.draw(24)
    results = []
    for layer in (first, second):
        layer.zero_grad()
        y_TD, _ = run(layer, tokens, training=training)
        y_TD.square().sum().backward()
        # With constant weights the gate is only reached through unused rerouting: a gradient of 0 instead of None.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in layer.parameters()]
        results.append([y_TD, *gradients])
    for ours, theirs in zip(*results, strict=True):
        tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(ours, theirs, **tolerance)


def test_top_k_of_all_equals_all_experts() -> None:
    # The k = E experts are summed in another order, so only the last bits may differ.
    case = Case("top_k", options={"top_k": 8, "renormalise": False})
    assert_layers_agree(*pair_of_layers(case, Case("all_experts")), exactly=False)


def test_switch_without_jitter_is_top_1() -> None:
    top_1 = Case("top_k", options={"top_k": 1, "softmax": "before", "renormalise": False})
    assert_layers_agree(*pair_of_layers(Case("switch", options={"jitter": 0.0}), top_1), exactly=True)


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_softmax_after_equals_before_with_renormalisation(top_k: int) -> None:
    after = Case("top_k", options={"top_k": top_k, "softmax": "after"})
    before = Case("top_k", options={"top_k": top_k, "softmax": "before", "renormalise": True})
    assert_layers_agree(*pair_of_layers(after, before), exactly=False)


def test_gshard_with_all_second_experts_is_top_2() -> None:
    gshard, top_2 = Case("gshard", options={"second_expert": "all"}), Case("top_k", options={"top_k": 2})
    assert_layers_agree(*pair_of_layers(gshard, top_2), exactly=False)


def test_expert_choice_of_all_tokens_equals_all_experts() -> None:
    everything = Case("expert_choice", options={"average_experts": 8})
    assert_layers_agree(*pair_of_layers(everything, Case("all_experts")), exactly=False)


@parametrize_cases(
    cases_of(8),
    rule=["megatron", "vmoe", "switch", "deepspeed"],
    factor=[8.0, float("inf")],
    slow_values={"rule": ("vmoe", "deepspeed")},
)
def test_capacity_factor_of_e_is_dropless(case: Case, rule, factor: float) -> None:
    # With a factor of E every rule gives each expert a slot for every token.
    for overflow in ("drop", "pass", "reroute"):
        capacity = Capacity(train=factor, rule=rule, overflow=overflow)
        if overflow == "reroute" and not (case.facts.makes_scores or case.is_soft or capacity.is_dropless):
            continue  # refused: without scores no expert is the next best
        _, record = run(case.layer(capacity=capacity), Tokens.draw(24), training=True)
        assert record.num_dropped == record.num_rerouted == 0
        assert_layers_agree(*pair_of_layers(case, case, capacity=capacity), exactly=False)
