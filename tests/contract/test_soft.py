"""The contract of soft routing, where that of assignment lists does not apply."""

import dataclasses
import math

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, build_context, cases_of, run

from moebench.errors import UsageError
from moebench.experts.bank_pass import BankPass
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.reference import slot_loop
from moebench.models.transformer import init_weights
from moebench.routing.metrics import LoadCount, summarise_load
from moebench.routing.mixing import SoftRouting
from moebench.routing.routers.soft_moe import SoftMoE

every_soft_case = pytest.mark.parametrize("case", [case for case in cases_of(8) if case.is_soft], ids=str)
every_soft_moe = pytest.mark.parametrize("case", [case for case in cases_of(8) if case.name == "soft_moe"], ids=str)


def build_small_routing() -> SoftRouting:
    """Build a routing of two tokens and two experts of one slot; logits ln [[1, 3], [1, 1]]."""
    logits_BLS = torch.tensor([[[1.0, 3.0], [1.0, 1.0]]]).log()
    return SoftRouting.from_logits(logits_BLS, num_experts=2)


def test_both_softmaxes_build_small_routing() -> None:
    routing = build_small_routing()
    # Over tokens: slot 0 takes 1/2 and 1/2, slot 1 takes 3/4 and 1/4. Over slots: 1/4 and 3/4, 1/2 and 1/2.
    assert routing.dispatch_BLS.flatten().tolist() == pytest.approx([0.5, 0.75, 0.5, 0.25])
    assert routing.combine_BLS.flatten().tolist() == pytest.approx([0.25, 0.75, 0.5, 0.5])
    assert (routing.num_tokens, routing.slots_per_expert) == (2, 1)
    assert routing.load_E.tolist() == [1, 1]
    assert routing.importance_E.tolist() == pytest.approx([0.75, 1.25])
    assert routing.experts_per_token_T.tolist() == [2, 2]


def test_padding_has_no_dispatch_or_combine_weights() -> None:
    logits_BLS = torch.zeros(2, 3, 4)
    valid_T = torch.tensor([True, True, False, False, False, False])
    routing = SoftRouting.from_logits(logits_BLS, num_experts=2, valid_T=valid_T)
    assert routing.dispatch_BLS[:, :, 0].flatten().tolist() == pytest.approx([0.5, 0.5, 0, 0, 0, 0])
    assert routing.combine_BLS[:, :, 0].flatten().tolist() == pytest.approx([0.25, 0.25, 0, 0, 0, 0])
    assert routing.load_E.tolist() == [2, 2], "the slots of a sequence of padding alone are empty"
    assert routing.experts_per_token_T.tolist() == [2, 2, 0, 0, 0, 0]


def test_slots_are_processed_by_their_experts() -> None:
    # Slot e is a mean of tokens; expert e computes it; a token gets the weighted sum back.
    bank, x_TD = ExpertBank(D_MODEL, 4, 2, "gelu"), Tokens.draw(2).x_TD
    init_weights(bank, 0)
    first_D, second_D = bank.expert((x_TD[0] + x_TD[1]) / 2, 0), bank.expert(0.75 * x_TD[0] + 0.25 * x_TD[1], 1)
    expected_TD = torch.stack([0.25 * first_D + 0.75 * second_D, (first_D + second_D) / 2])
    torch.testing.assert_close(build_small_routing().compute(BankPass(bank, x_TD)), expected_TD)
    torch.testing.assert_close(slot_loop(bank, x_TD, build_small_routing()), expected_TD)


@every_soft_moe
def test_sequences_have_separate_slots(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(48, length=16)
    y_TD, record = run(layer, tokens, training=False)
    torch.testing.assert_close(y_TD, slot_loop(layer.bank, tokens.x_TD, record.kept))


@every_soft_case
def test_capacity_drops_nothing(case: Case) -> None:
    tokens, results = Tokens.draw(32, length=16), []
    for capacity in (Capacity(), Capacity(eval=0.1), Capacity(eval=0.1, overflow="reroute")):
        y_TD, record = run(case.layer(capacity=capacity), tokens, training=False)
        assert record.num_dropped == record.num_rerouted == record.num_unserved == 0
        assert record.kept.load_E.unique().numel() == 1
        assert record.kept.load_E.min() > 0
        summary = summarise_load([LoadCount.from_record(record)])
        assert summary["load/cv"] == summary["load/drop_rate"] == summary["load/unserved"] == 0
        results.append(y_TD)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@every_soft_moe
def test_scale_of_0_mixes_all_tokens_evenly(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(16)
    with torch.no_grad():
        layer.router.scale.zero_()
    y_TD, _ = run(layer, tokens, training=False)
    mean_D = tokens.x_TD.mean(0)
    expected_D = torch.stack([layer.bank.expert(mean_D, e) for e in range(8)]).mean(0)
    torch.testing.assert_close(y_TD, expected_D.expand(16, -1))


@every_soft_moe
def test_routing_ignores_vector_lengths(case: Case) -> None:
    router, tokens = case.router(), Tokens.draw(16)
    longer = dataclasses.replace(tokens, x_TD=3 * tokens.x_TD)
    ours, theirs = (router(each.x_TD, each.context(training=False)) for each in (tokens, longer))
    torch.testing.assert_close(ours.combine_BLS, theirs.combine_BLS)


@pytest.mark.parametrize(
    ("options", "num_experts", "slots"),
    [
        ({}, 8, 2),  # 16 · 1 / 8
        ({"average_experts": 3}, 8, 6),
        ({}, 9, 2),  # 1.78
        ({}, 64, 1),  # 0.25, at least one
        ({"slots_per_expert": 5}, 8, 5),
    ],
)
def test_slots_and_rows_by_hand(options: dict, num_experts: int, slots: int) -> None:
    config = SoftMoE.Config(**options)
    router = SoftMoE(config, build_context(num_experts))
    assert router.slots_per_expert == slots
    assert router.rows_per_token(config.average_experts) == num_experts * slots / 16
    # logits, tokens to slots, slots to tokens: 2·D for each slot
    assert router.flops_per_token() == 3 * 2 * D_MODEL * num_experts * slots


def test_layer_flops_count_slots_not_tokens() -> None:
    # 8 experts of one slot for 16 tokens: half a row for each token, of 2·2·8·8 FLOPs.
    layer = Case("soft_moe", options={"slots_per_expert": 1}).layer()
    assert layer.flops_per_token() == 3 * 2 * 8 * 8 + 2 * 2 * 8 * 8 // 2


def test_options_without_slots_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^router\.average_experts=9 does not fit layout\.num_experts=8"):
        SoftMoE.check(SoftMoE.Config(average_experts=9), 8)
    with pytest.raises(UsageError, match=r"^router\.slots_per_expert must be at least 1, or null, got 0"):
        SoftMoE.check(SoftMoE.Config(slots_per_expert=0), 8)
    nowhere = build_context(8, sequence_length=None)
    with pytest.raises(UsageError, match=r"^router\.slots_per_expert must be set"):
        SoftMoE(SoftMoE.Config(), nowhere)
    assert SoftMoE(SoftMoE.Config(slots_per_expert=2), nowhere).rows_per_token(1) == 1


def test_initial_slots_are_unit_vectors_on_average() -> None:
    router = SoftMoE(SoftMoE.Config(slots_per_expert=64), dataclasses.replace(build_context(8), d_model=64))
    init_weights(router, 0)
    assert router.scale.item() == 1
    assert router.slot_EPD.square().sum(-1).mean().item() == pytest.approx(1, rel=0.02)
    assert math.isclose(router.slot_EPD.std().item(), 1 / 8, rel_tol=0.02)
