"""Every layout with every router: it runs, costs what it says, is matched, and sees no future."""

import pytest
import torch
from support.cases import Tokens, parametrize_pairs, randomise_parameters
from support.layout_models import BATCH, LENGTH, backbone_of, batch, config_of, may_refuse
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.experts.layout import LAYOUTS
from moebench.experts.projection import HeadBank, ProjectionBank
from moebench.experts.reference import double_loop
from moebench.experts.widths import MATCH_TOLERANCE
from moebench.models.build import build_backbone
from moebench.models.cost import cost_of, executed_flops_per_token
from moebench.models.transformer import BatchContext, Transformer
from moebench.models.whole_model import StackBank
from moebench.routing.values import LayerRecord

NUM_TOKENS = BATCH * LENGTH
every_layout = pytest.mark.parametrize("layout", LAYOUTS.names())
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def model_or_skip(layout: str, router: str) -> Transformer:
    """Build the model, or check that it is refused for the reason that is allowed."""
    reason = may_refuse(layout, router)
    if reason:
        with pytest.raises(UsageError, match=reason) as caught:
            backbone_of(config_of(layout, router))
        assert "\n" not in str(caught.value)
        pytest.skip(f"refused: {reason}")
    return backbone_of(config_of(layout, router))


def executed_flops(backbone: Transformer, records: list[LayerRecord]) -> float:
    """Return what a forward pass over the batch cost by the formulas that results report."""
    excess = {}
    for layer, record in zip(backbone.moe_layers(), records, strict=True):
        beyond = layer.executed_flops(record) - NUM_TOKENS * layer.routed_flops_per_token(LENGTH)
        excess[layer.name] = float(beyond) / NUM_TOKENS
    planned = cost_of(backbone, [], LENGTH).flops_per_token
    return NUM_TOKENS * executed_flops_per_token(backbone, planned, excess, LENGTH)


def count_flops(backbone: Transformer, *, training: bool) -> tuple[int, Tensor, list[LayerRecord], Tensor]:
    """Return what torch's own counter saw in a forward pass, with input, records and output."""
    x_BLD, ctx = batch(training=training)
    x_BLD = x_BLD.double().requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y_BLD, records = backbone(x_BLD, ctx)
    return counter.get_total_flops(), x_BLD, records, y_BLD


@parametrize_pairs(may_refuse)
def test_runs_and_costs_what_it_says(layout: str, router: str) -> None:
    backbone = model_or_skip(layout, router).double()  # in fp64 every expert is a plain product, which is counted
    counted, x_BLD, records, y_BLD = count_flops(backbone, training=True)
    assert executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)
    layers = backbone.moe_layers()
    assert [record.layer for record in records] == [layer.name for layer in layers]
    assert len({record.layer for record in records}) == len(records)
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None
    assert x_BLD.grad.isfinite().all()
    assert all(parameter.grad is not None for layer in layers for parameter in layer.bank.parameters())
    cost = cost_of(backbone, [], LENGTH)
    assert cost.total_params == sum(parameter.numel() for parameter in backbone.parameters())
    dense = cost_of(backbone_of(config_of(layout, "dense")), [], LENGTH)
    assert cost.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)
    assert cost.active_params <= cost.total_params


@parametrize_pairs(may_refuse)
def test_executed_flops_in_evaluation_are_those_of_torch(layout: str, router: str) -> None:
    backbone = model_or_skip(layout, router).double().eval()
    counted, _, records, _ = count_flops(backbone, training=False)
    assert executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)


@every_layout
@pytest.mark.parametrize("router", ["top_k", "top_p"])
def test_executed_flops_count_what_a_capacity_leaves(layout: str, router: str) -> None:
    reason = may_refuse(layout, router)
    if reason:
        pytest.skip(f"refused: {reason}")
    backbone = randomise_parameters(backbone_of(config_of(layout, router, capacity_factor_train=0.25))).double()
    counted, _, records, _ = count_flops(backbone, training=True)
    assert all(record.num_dropped > 0 for record in records)
    assert executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)


@every_layout
def test_banks_equal_a_double_loop(layout: str) -> None:
    backbone = randomise_parameters(
        backbone_of(config_of(layout, "top_k", {"ffn_width": 64}, match="none", expert_width=None))
    )
    x_BLD, ctx = batch(training=True)
    _, records = backbone(x_BLD, ctx)
    for layer, record in zip(backbone.moe_layers(), records, strict=True):
        if isinstance(layer.bank, HeadBank | StackBank | ProjectionBank):
            continue  # they need a sequence, or change the width: checked below and in test_layout_models.py
        x_TD = Tokens.draw(NUM_TOKENS).x_TD.repeat(1, 2).requires_grad_()
        leaves = [x_TD, *layer.bank.parameters()]
        fast_TD, slow_TD = layer.bank.mixture(x_TD, record.kept), double_loop(layer.bank, x_TD, record.kept)
        torch.testing.assert_close(fast_TD, slow_TD, rtol=1e-4, atol=1e-4)
        pull_TD = torch.randn(fast_TD.shape, generator=torch.Generator().manual_seed(1))
        for ours, theirs in zip(
            torch.autograd.grad((fast_TD * pull_TD).sum(), leaves, retain_graph=True),
            torch.autograd.grad((slow_TD * pull_TD).sum(), leaves, retain_graph=True, allow_unused=True),
            strict=True,
        ):
            torch.testing.assert_close(ours, torch.zeros_like(ours) if theirs is None else theirs, rtol=1e-3, atol=1e-3)


@every_layout
@both_modes
@pytest.mark.parametrize("router", ["switch", "top_k", "hash"])
def test_sees_no_future(layout: str, router: str, training: bool) -> None:
    backbone = randomise_parameters(model_or_skip(layout, router))
    x_BLD, ctx = batch(training=training)
    other_BLD = x_BLD.clone()
    other_BLD[:, LENGTH // 2 :] = batch(training=training, seed=1)[0][:, LENGTH // 2 :]
    y_BLD, _ = backbone(x_BLD, ctx)
    other, _ = backbone(other_BLD, ctx)
    past = slice(0, LENGTH // 2)
    torch.testing.assert_close(other[:, past], y_BLD[:, past], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other[:, LENGTH // 2 :], y_BLD[:, LENGTH // 2 :])


@every_layout
def test_does_not_mix_sequences(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k")))
    x_BLD, ctx = batch(training=False, size=3)
    other_BLD = x_BLD.clone()
    other_BLD[0] += 1
    torch.testing.assert_close(backbone(other_BLD, ctx)[0][1:], backbone(x_BLD, ctx)[0][1:], rtol=1e-4, atol=1e-4)


@every_layout
def test_padding_goes_nowhere(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k")))
    x_BLD, ctx = batch(training=False)
    valid_BL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid_BL[1, 10:] = False
    padded = type(ctx)(training=False, seed=0, token_id_BL=ctx.token_id_BL, valid_BL=valid_BL)
    whole, _ = backbone(x_BLD, ctx)
    y_BLD, records = backbone(x_BLD, padded)
    torch.testing.assert_close(y_BLD[valid_BL], whole[valid_BL], rtol=1e-4, atol=1e-4)
    for record in records:
        assert not record.kept.experts_per_token_T[~valid_BL.flatten()].any()


@every_layout
def test_with_a_capacity_some_assignments_are_dropped(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k", capacity_factor_train=0.25)))
    x_BLD, ctx = batch(training=True)
    y_BLD, records = backbone(x_BLD, ctx)
    assert y_BLD.isfinite().all()
    assert all(record.num_dropped > 0 for record in records)


@every_layout
def test_counts_without_allocating(layout: str) -> None:
    real = cost_of(backbone_of(config_of(layout)), [], LENGTH)
    with torch.device("meta"):
        planned = build_backbone(config_of(layout), causal=True, sequence_length=LENGTH)
    assert cost_of(planned, [], LENGTH) == real


@every_layout
def test_arms_share_the_weights_of_what_they_share(layout: str) -> None:
    ours = backbone_of(config_of(layout, "top_k", expert_width=64)).state_dict()
    plain = backbone_of(config_of("every_n", "top_k", expert_width=64)).state_dict()
    dense = backbone_of(config_of("every_n", "dense")).state_dict()
    shared = [name for name in ours if name in dense and ours[name].shape == dense[name].shape]
    assert "norm.weight" in shared
    assert all(torch.equal(ours[name], dense[name]) for name in shared)
    same = [name for name in ours if name in plain and ours[name].shape == plain[name].shape]
    assert all(torch.equal(ours[name], plain[name]) for name in same)
    if layout != "whole_model":
        assert sum("attention_norm" in name or "attention.out" in name for name in same) >= 2


@pytest.mark.parametrize("layout", ["every_n", "fine_grained", "residual", "whole_model", "attention"])
def test_activation_of_experts_is_an_option(layout: str) -> None:
    feed_forward = {"feed_forward": "experts"} if layout == "attention" else {}
    gelu, swiglu = (
        cost_of(backbone_of(config_of(layout, "top_k", expert_activation=a, **feed_forward)), [], LENGTH)
        for a in ("gelu", "swiglu")
    )
    dense = cost_of(backbone_of(config_of(layout, "dense")), [], LENGTH)
    assert gelu.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)
    assert swiglu.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)


@every_layout
@pytest.mark.parametrize("total", [1.0, 5.0])
def test_parameters_are_matched_if_asked(layout: str, total: float) -> None:
    config = config_of(layout, "top_k", {"ffn_width": 4096}, match="params", total_params=total)
    if layout == "whole_model" and total == 1.0:
        config = config_of(layout, "top_k", {"ffn_width": 4096}, match="params", total_params=total, num_experts=2)
    backbone = backbone_of(config)
    dense = backbone_of(config_of(layout, "dense", {"ffn_width": 4096}))
    held = [
        index for index, block in enumerate(backbone.blocks) if any(isinstance(m, MoELayer) for m in block.modules())
    ]
    for index in held:
        ours = sum(p.numel() for p in backbone.blocks[index].parameters())
        of_dense = dense.blocks if layout == "whole_model" else [dense.blocks[index]]
        theirs = sum(p.numel() for block in of_dense for p in block.parameters())
        assert ours == pytest.approx(total * theirs, rel=MATCH_TOLERANCE)
    assert held


@every_layout
def test_padding_is_not_read_where_attention_sees_all(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k"), causal=False))
    x_BLD, ctx = batch(training=False)
    valid_BL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid_BL[0] = False  # a sequence of padding alone
    valid_BL[1, 10:] = False
    padded = type(ctx)(training=False, seed=0, token_id_BL=ctx.token_id_BL, valid_BL=valid_BL)
    other_BLD = torch.where(valid_BL[..., None], x_BLD, x_BLD + 7)
    y_BLD, _ = backbone(x_BLD, padded)
    assert y_BLD.isfinite().all()
    torch.testing.assert_close(backbone(other_BLD, padded)[0][valid_BL], y_BLD[valid_BL], rtol=1e-4, atol=1e-4)
    short_BLD, _ = backbone(x_BLD[1:2, :10], batch_of_one(ctx, 10))
    torch.testing.assert_close(y_BLD[1, :10], short_BLD[0], rtol=1e-4, atol=1e-4)


def batch_of_one(ctx: BatchContext, length: int) -> BatchContext:
    """Return the context of the second sequence alone, cut to its first places."""
    assert ctx.token_id_BL is not None
    return type(ctx)(training=False, seed=0, token_id_BL=ctx.token_id_BL[1:2, :length])
