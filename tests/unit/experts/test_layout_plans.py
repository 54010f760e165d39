"""Layouts by hand: where experts are, how wide, and what they cost."""

from typing import Any

import pytest
import torch
from support.cases import Tokens, randomise_parameters
from support.planned_layouts import backbone_of, config_of, cost

from moebench.experts.assembly import RouterPlan, scale_experts_per_token
from moebench.experts.feed_forward import NetworkStyle
from moebench.experts.layout import LAYOUTS, ExpertShape
from moebench.experts.mixed import ConstantBank, DeepBank, MixedBank, build_bank
from moebench.experts.widths import Widths
from moebench.models.plan import plan_blocks
from moebench.models.transformer import BatchContext
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS


def banks_of(layout: dict[str, Any], num_layers: int = 4) -> list[int]:
    """Return the number of feed-forward experts of each block, 0 for a dense one."""
    plan = plan_blocks(config_of(layout, num_layers=num_layers))
    return [len(block.feed_forward.shapes) if block.feed_forward else 0 for block in plan]


@pytest.mark.parametrize(
    ("layout", "experts"),
    [
        ({"name": "every_n", "n": 2, "num_experts": 3}, [0, 3, 0, 3]),
        ({"name": "first_n", "n": 2, "num_experts": 3}, [3, 3, 0, 0]),
        ({"name": "last_n", "n": 1, "num_experts": 3}, [0, 0, 0, 3]),
        ({"name": "last_n", "n": 3, "num_experts": 3}, [0, 3, 3, 3]),
        ({"name": "last_n", "n": 2, "stride": 2, "num_experts": 3}, [0, 3, 0, 3]),
        ({"name": "last_n", "n": 1, "stride": 3, "num_experts": 3}, [0, 0, 3, 0]),
        ({"name": "middle", "n": 2, "num_experts": 3}, [0, 3, 3, 0]),
        ({"name": "middle", "n": 1, "num_experts": 3}, [0, 0, 3, 0]),
        ({"name": "pyramid", "num_experts": 3}, [3, 3, 6, 6]),
        ({"name": "pyramid", "num_experts": 3, "factor": 4, "top": 1}, [3, 3, 3, 12]),
        ({"name": "pyramid", "num_experts": 3, "blocks": [1, 3], "top": 1}, [0, 3, 0, 6]),
        ({"name": "residual", "num_experts": 3, "blocks": [0]}, [3, 0, 0, 0]),
        ({"name": "fine_grained", "split": 1, "num_experts": 3, "blocks": [2, 0]}, [3, 0, 3, 0]),
        ({"name": "zero_computation", "num_experts": 3, "blocks": [1]}, [0, 7, 0, 0]),
        (
            {"name": "listed", "num_experts": 3, "blocks": [{"block": 1}, {"block": 3, "num_experts": 5}]},
            [0, 3, 0, 5],
        ),
    ],
    ids=str,
)
def test_where_experts_are(layout: dict[str, Any], experts: list[int]) -> None:
    assert banks_of(layout) == experts


def test_one_expert_in_the_list_can_be_wider_and_deeper() -> None:
    blocks = [{"block": 0, "num_experts": 2, "expert_width": 12, "depth": 3}, {"block": 2}]
    first, third = backbone_of({"name": "listed", "num_experts": 4, "blocks": blocks}).moe_layers()
    assert isinstance(first.bank, DeepBank)
    assert [bank.w_in_EDF.shape for bank in first.bank.banks] == [(2, 8, 12)] * 3
    assert third.bank.w_in_EDF.shape == (4, 8, 62)  # 64, less the gate's 4·8 FLOPs: 2 hidden units; 60 is too few


# One unit of width is 2 matrices of 8: 2·2·8 = 32 FLOPs; the dense network has 64 units.
@pytest.mark.parametrize(
    ("layout", "router", "width"),
    [
        # gate of 8 experts: 2·64 FLOPs = 4 units; 60 are left
        ({"name": "every_n", "num_experts": 8}, "switch", 60),
        # two networks one after another
        ({"name": "every_n", "num_experts": 8, "depth": 2}, "switch", 30),
        # the network beside, of the same width, and its mix: 2·2·8 = 1 unit; 59 for two, 29 is 1 short
        ({"name": "residual", "num_experts": 8}, "switch", 30),
        # 16 experts: 8 units for the gate; 4 routed and 1 shared: 56 / 5 = 11.2
        ({"name": "fine_grained", "num_experts": 4}, {"name": "top_k", "top_k": 1, "renormalise": False}, 11),
        # a gate over 4 groups and 4 over 2 experts each: 12 · 16 FLOPs = 6 units
        ({"name": "hierarchical", "num_experts": 8}, "switch", 58),
        # two gates over 4 experts each: 4 units; one expert in each group
        ({"name": "prototypes", "num_experts": 8}, "switch", 30),
    ],
    ids=str,
)
def test_matched_width_by_hand(layout: dict[str, Any], router: Any, width: int) -> None:
    for layer in backbone_of(layout, router).moe_layers():
        bank = layer.bank.banks[0] if isinstance(layer.bank, DeepBank) else layer.bank
        assert bank.w_in_EDF.shape[-1] == width
        if layer.shared is not None:
            assert layer.shared.w_in_DF.shape[-1] == width
    ours, dense = cost(layout, router), cost(layout, "dense")
    assert ours.flops_per_token == pytest.approx(dense.flops_per_token, rel=0.02)


def test_mixed_bank_is_matched_at_an_even_load() -> None:
    # 4 networks among 6 experts: at an even load a token meets 4/6 of one. The gate costs 3 units: 61 / (4/6) = 91.5
    layout = {"name": "zero_computation", "num_experts": 4, "zero": 1, "copy": 1, "constant": 0}
    (layer, *_) = backbone_of(layout).moe_layers()
    assert isinstance(layer.bank, MixedBank)
    assert layer.bank.groups[0].w_in_EDF.shape[-1] == 92
    assert layer.bank.flops_per_row_E() == (92 * 32,) * 4 + (0, 0)
    assert layer.flops_per_token() == 2 * 8 * 6 + 4 * 92 * 32 // 6


def test_relative_widths_and_depths_are_distributed_over_experts() -> None:
    layout = {"name": "heterogeneous", "num_experts": 4, "widths": [0.5, 1.5], "depths": [1, 2], "expert_width": 8}
    (layer, *_) = backbone_of(layout).moe_layers()
    assert layer.bank.flops_per_row_E() == (4 * 32, 4 * 32, 2 * 12 * 32, 2 * 12 * 32)


def test_the_penalty_on_large_experts_knows_the_sizes_of_the_layer() -> None:
    # Widths 4 and 12, of 16 tokens 8 each: sizes 1/2 and 3/2 of the mean, f = 1/2 each: P_0/2 + 3 P_1/2.
    layout = {"name": "heterogeneous", "num_experts": 2, "widths": [0.5, 1.5], "expert_width": 8}
    (layer, *_) = backbone_of(layout, "switch").moe_layers()
    randomise_parameters(layer)
    tokens = Tokens.draw(16)
    x_TD = torch.cat([tokens.x_TD[:8], -tokens.x_TD[:8]])  # a linear gate sends x and -x to different experts
    _, record = layer(x_TD, tokens.context(training=False))
    assert record.flops_E == (4 * 32, 12 * 32)
    assert record.load_E.tolist() == [8, 8]
    mean_E = record.routing.scores_TE.mean(0)
    penalty = LOSSES.get("parameter_penalty").item(record)
    torch.testing.assert_close(penalty, mean_E[0] / 2 + 3 * mean_E[1] / 2)
    # To go downhill is to raise the score of the small expert for every token.
    (gradient_TE,) = torch.autograd.grad(penalty, record.routing.logits_TE)
    assert (gradient_TE[:, 0] < 0).all()


def test_attention_experts_make_the_network_narrower() -> None:
    # Two of 4 experts with three maps of 64 weights: 3·64 more than dense, and a gate of 32: 224 of the dense network's
    # 1024 weights. With two maps (keys are values): 64 more, and the gate.
    for keys_values, maps, width in (("apart", 3, 50), ("shared", 2, 58)):
        layout = {"name": "attention", "num_experts": 4, "keys_values": keys_values}
        backbone = backbone_of(layout, "top_k")
        assert backbone.blocks[0].attention.layer.bank.weight_EDO.shape == (4, 8, maps * 8)
        assert backbone.blocks[0].feed_forward.w_in_DF.shape == (8, width)
        assert 2 * 8 * width + (2 * maps - 3) * 64 + 32 == 2 * 8 * 64
    # One expert with two maps: a map of 64 weights less than dense, less the gate: the network is 2 units wider.
    backbone = backbone_of({"name": "attention", "num_experts": 4}, "switch")
    assert backbone.blocks[0].feed_forward.w_in_DF.shape == (8, 66)
    assert 2 * 8 * 66 - 64 + 32 == 2 * 8 * 64


def test_heads_are_distributed_over_experts() -> None:
    # Two experts per token and two heads: one head each, keys and values of one head instead of two.
    attention = backbone_of({"name": "moduleformer", "num_experts": 4}, "top_k").blocks[0].attention
    assert (attention.heads_per_expert, attention.style.head_width) == (1, 4)
    assert attention.key_value.weight.shape == (8, 8)
    # 4 experts x 2 projections x 8·4 weights, keys and values 8·8, gate 4·8
    assert sum(p.numel() for p in attention.parameters()) == 4 * 2 * 32 + 64 + 32


def test_whole_model_cost_by_hand() -> None:
    ours = cost({"name": "whole_model", "num_experts": 5, "expert_width": 16}, num_layers=2)
    block = 4 * 64 + 2 * 8 + 2 * 8 * 16  # attention, two norms, network
    assert ours.total_params == 5 * 2 * block + 5 * 8 + 8  # stacks, gate, the last norm
    assert ours.active_params == 2 * block + 5 * 8 + 8
    # In a sequence of 10, a stack has 2 at an even load: scores of 4·2·8 in each block.
    assert ours.flops_per_token == 2 * (2 * (4 * 64 + 2 * 8 * 16) + 4 * 2 * 8) + 2 * 5 * 8


def test_parameters_by_hand() -> None:
    # In each of 4 blocks 4 experts together are one dense network of 66, less 2 units for the gate: 64 / 4 = 16.
    ours = cost({"name": "every_n", "num_experts": 4, "match": "params"}, ffn_width=66)
    dense = cost({"name": "every_n"}, "dense", ffn_width=66)
    assert dense.total_params == 4 * (4 * 64 + 2 * 8 + 2 * 8 * 66) + 8
    assert ours.total_params == 4 * (4 * 64 + 2 * 8 + 4 * 2 * 8 * 16 + 4 * 8) + 8 == dense.total_params
    assert ours.flops_per_token < dense.flops_per_token  # one expert of four is used
    twice = cost({"name": "every_n", "num_experts": 4, "match": "params", "total_params": 2.0}, ffn_width=66)
    assert twice.total_params == pytest.approx(2 * dense.total_params, rel=0.02)


@pytest.mark.parametrize(
    ("num_layers", "n", "blocks"), [(12, 2, [9, 11]), (24, 5, [15, 17, 19, 21, 23]), (8, 2, [5, 7]), (3, 1, [1])]
)
def test_last_n_of_every_second_block_is_that_of_v_moe(num_layers: int, n: int, blocks: list[int]) -> None:
    # range(1, L, 2)[-n:] in google-research/vmoe, configs/vmoe_paper/common.py
    experts = banks_of({"name": "last_n", "n": n, "stride": 2, "num_experts": 3}, num_layers)
    assert [block for block, number in enumerate(experts) if number] == blocks


def test_without_matching_an_expert_is_as_wide_as_the_dense_network() -> None:
    (layer, *_) = backbone_of({"name": "every_n", "num_experts": 4, "match": "none"}).moe_layers()
    assert layer.bank.w_in_EDF.shape[-1] == 64


def test_a_dense_router_makes_every_layout_the_dense_model() -> None:
    for name in LAYOUTS.names():
        assert cost({"name": name, "num_experts": 4}, "dense") == cost({"name": "every_n"}, "dense")


def test_experts_per_token_are_scaled_where_they_can_be() -> None:
    top_k, choice, everything = (ROUTERS.get(name).item for name in ("top_k", "expert_choice", "all_experts"))
    assert scale_experts_per_token(top_k, top_k.Config(top_k=3), 4, 32).top_k == 12
    assert scale_experts_per_token(choice, choice.Config(), 4, 32).average_experts == 8
    assert scale_experts_per_token(everything, everything.Config(), 4, 32) == everything.Config()
    plan = plan_blocks(config_of({"name": "fine_grained", "num_experts": 8}, "top_k"))
    assert plan[0].feed_forward is not None
    assert RouterPlan.of(config_of({"name": "every_n"}, "top_k").router, plan[0].feed_forward).experts_per_token == 8


def test_experts_without_a_network_by_hand() -> None:
    shapes = [ExpertShape(kind="zero"), ExpertShape(kind="copy"), ExpertShape(kind="constant")]
    bank = randomise_parameters(build_bank(shapes, Widths(4), NetworkStyle(d_model=8, activation="gelu")))
    x_RD = Tokens.draw(6).x_TD
    y_RD = bank.rows(x_RD, torch.tensor([2, 2, 2]))
    assert not y_RD[:2].any()
    assert torch.equal(y_RD[2:4], x_RD[2:4])
    constant = bank.groups[2]
    assert isinstance(constant, ConstantBank)
    first, second = torch.softmax(constant.w_mix_ED2[0].T @ x_RD[4], 0)
    torch.testing.assert_close(y_RD[4], first * x_RD[4] + second * constant.vector_ED[0])


def test_a_deep_expert_by_hand() -> None:
    bank = randomise_parameters(
        build_bank([ExpertShape(depth=2)] * 3, Widths(4), NetworkStyle(d_model=8, activation="gelu"))
    )
    x_RD = Tokens.draw(5).x_TD
    first, second = bank.banks
    h_RD = x_RD + first.expert(x_RD, 1)
    expected_RD = h_RD + second.expert(h_RD, 1) - x_RD
    torch.testing.assert_close(bank.rows(x_RD, torch.tensor([0, 5, 0])), expected_RD)
    assert bank.flops_per_row_E() == (2 * 2 * 2 * 8 * 4,) * 3


@pytest.mark.parametrize("layout", LAYOUTS.names())
def test_a_batch_without_tokens(layout: str) -> None:
    backbone = backbone_of({"name": layout, "num_experts": 8, "match": "none"}, "top_k")
    ctx = BatchContext(training=True, seed=0, token_id_BL=torch.zeros(1, 1, dtype=torch.int64))
    y_BLD, _ = randomise_parameters(backbone)(torch.zeros(1, 1, 8), ctx)
    assert y_BLD.shape == (1, 1, 8)
    nothing = BatchContext(training=True, seed=0, valid_BL=torch.zeros(2, 3, dtype=torch.bool))
    y_BLD, records = backbone(torch.randn(2, 3, 8), nothing)
    assert y_BLD.isfinite().all()
    assert all(record.kept.load_E.sum() == 0 for record in records)
