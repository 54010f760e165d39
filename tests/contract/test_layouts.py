"""Every layout with every router: it runs, has the declared cost, is matched, and is causal."""

import pytest
import torch
from support.case_selection import combine_axes, parametrize_pairs
from support.cases import Tokens, randomise_parameters
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
from moebench.models.cost import compute_cost, executed_flops_per_token
from moebench.models.transformer import BatchContext, Transformer
from moebench.models.whole_model import StackBank
from moebench.routing.context import DataSummary
from moebench.routing.values import LayerRecord

NUM_TOKENS = BATCH * LENGTH
every_layout = pytest.mark.parametrize("layout", LAYOUTS.names())


def model_or_skip(layout: str, router: str) -> Transformer:
    """Build the model, or skip if it is refused for an allowed reason."""
    reason = may_refuse(layout, router)
    if reason:
        with pytest.raises(UsageError, match=reason) as caught:
            backbone_of(config_of(layout, router))
        assert "\n" not in str(caught.value)
        pytest.skip(f"refused: {reason}")
    return backbone_of(config_of(layout, router))


def sum_executed_flops(backbone: Transformer, records: list[LayerRecord]) -> float:
    """Return the FLOPs of a forward pass over the batch by the formulas used in results."""
    excess = {}
    for layer, record in zip(backbone.moe_layers(), records, strict=True):
        beyond = layer.executed_flops(record) - NUM_TOKENS * layer.routed_flops_per_token(LENGTH)
        excess[layer.name] = float(beyond) / NUM_TOKENS
    planned = compute_cost(backbone, [], LENGTH).flops_per_token
    return NUM_TOKENS * executed_flops_per_token(backbone, planned, excess, LENGTH)


def count_flops(backbone: Transformer, *, training: bool) -> tuple[int, Tensor, list[LayerRecord], Tensor]:
    """Return torch's FLOP count of a forward pass, with input, records and output."""
    x_BLD, ctx = batch(training=training)
    x_BLD = x_BLD.double().requires_grad_()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        y_BLD, records = backbone(x_BLD, ctx)
    return counter.get_total_flops(), x_BLD, records, y_BLD


@parametrize_pairs(may_refuse)
def test_planned_flops_match_torch(layout: str, router: str) -> None:
    backbone = model_or_skip(layout, router).double()  # in fp64 every expert is a plain product, which is counted
    counted, x_BLD, records, y_BLD = count_flops(backbone, training=True)
    assert sum_executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)
    layers = backbone.moe_layers()
    assert [record.layer for record in records] == [layer.name for layer in layers]
    assert len({record.layer for record in records}) == len(records)
    y_BLD.square().sum().backward()
    assert x_BLD.grad is not None
    assert x_BLD.grad.isfinite().all()
    assert all(parameter.grad is not None for layer in layers for parameter in layer.bank.parameters())
    cost = compute_cost(backbone, [], LENGTH)
    assert cost.total_params == sum(parameter.numel() for parameter in backbone.parameters())
    dense = compute_cost(backbone_of(config_of(layout, "dense")), [], LENGTH)
    assert cost.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)
    assert cost.active_params <= cost.total_params


@parametrize_pairs(may_refuse, each_family=False)
def test_executed_flops_in_evaluation_match_torch(layout: str, router: str) -> None:
    backbone = model_or_skip(layout, router).double().eval()
    counted, _, records, _ = count_flops(backbone, training=False)
    assert sum_executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)


@every_layout
@pytest.mark.parametrize("router", ["top_k", "top_p"])
def test_executed_flops_with_a_capacity_match_torch(layout: str, router: str) -> None:
    reason = may_refuse(layout, router)
    if reason:
        pytest.skip(f"refused: {reason}")
    backbone = randomise_parameters(backbone_of(config_of(layout, router, capacity_factor_train=0.25))).double()
    counted, _, records, _ = count_flops(backbone, training=True)
    assert all(record.num_dropped > 0 for record in records)
    assert sum_executed_flops(backbone, records) == pytest.approx(counted, rel=1e-12)


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
@pytest.mark.parametrize(
    ("router", "training"),
    combine_axes(["switch", "top_k", "hash"], [True, False], quick=[("switch", False), ("top_k", True)]),
)
def test_layout_is_causal(layout: str, router: str, training: bool) -> None:
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
def test_sequences_are_independent(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k")))
    x_BLD, ctx = batch(training=False, size=3)
    other_BLD = x_BLD.clone()
    other_BLD[0] += 1
    torch.testing.assert_close(backbone(other_BLD, ctx)[0][1:], backbone(x_BLD, ctx)[0][1:], rtol=1e-4, atol=1e-4)


@every_layout
def test_padding_is_not_computed(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k")))
    x_BLD, ctx = batch(training=False)
    valid_BL = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    valid_BL[1, 10:] = False
    padded = type(ctx)(training=False, seed=0, token_id_BL=ctx.token_id_BL, valid_BL=valid_BL)
    complete, _ = backbone(x_BLD, ctx)
    y_BLD, records = backbone(x_BLD, padded)
    torch.testing.assert_close(y_BLD[valid_BL], complete[valid_BL], rtol=1e-4, atol=1e-4)
    for record in records:
        assert not record.kept.experts_per_token_T[~valid_BL.flatten()].any()


@every_layout
def test_small_capacity_drops_assignments(layout: str) -> None:
    backbone = randomise_parameters(backbone_of(config_of(layout, "top_k", capacity_factor_train=0.25)))
    x_BLD, ctx = batch(training=True)
    y_BLD, records = backbone(x_BLD, ctx)
    assert y_BLD.isfinite().all()
    assert all(record.num_dropped > 0 for record in records)


@every_layout
def test_cost_is_counted_on_the_meta_device(layout: str) -> None:
    real = compute_cost(backbone_of(config_of(layout)), [], LENGTH)
    with torch.device("meta"):
        planned = build_backbone(config_of(layout), causal=True, data=DataSummary(sequence_length=LENGTH))
    assert compute_cost(planned, [], LENGTH) == real


@every_layout
def test_shared_modules_have_equal_initial_weights_across_arms(layout: str) -> None:
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
def test_activation_option_applies_to_experts(layout: str) -> None:
    feed_forward = {"feed_forward": "experts"} if layout == "attention" else {}
    gelu, swiglu = (
        compute_cost(backbone_of(config_of(layout, "top_k", expert_activation=a, **feed_forward)), [], LENGTH)
        for a in ("gelu", "swiglu")
    )
    dense = compute_cost(backbone_of(config_of(layout, "dense")), [], LENGTH)
    assert gelu.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)
    assert swiglu.flops_per_token == pytest.approx(dense.flops_per_token, rel=MATCH_TOLERANCE)


@every_layout
@pytest.mark.parametrize("total", [1.0, 5.0])
def test_match_params_matches_parameters(layout: str, total: float) -> None:
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
def test_bidirectional_attention_ignores_padding(layout: str) -> None:
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
    """Return the context of the second sequence alone, truncated to `length` tokens."""
    assert ctx.token_id_BL is not None
    return type(ctx)(training=False, seed=0, token_id_BL=ctx.token_id_BL[1:2, :length])
