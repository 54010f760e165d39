"""SMEAR and Lory, which merge expert parameters: values by hand, identities, segments, costs, refusals."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import D_MODEL, Case, Tokens, build_context, merge_loop, randomise_parameters, route, run
from support.layout_models import backbone_of, batch, config_of
from support.training_cases import tiny_config, write_text
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from moebench.compatibility import check_cell
from moebench.errors import UsageError
from moebench.experts.bank import merge_weights
from moebench.experts.bank_pass import BankPass
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.mixed import DeepBank
from moebench.models.transformer import init_weights
from moebench.routing.metrics import LoadCount, summarise_load
from moebench.routing.mixing import MergeRouting
from moebench.routing.router import ROUTERS

MERGING = ("smear", "lory")
every_merging = pytest.mark.parametrize("name", MERGING)


def merged_by(weight_GE: Tensor, num_tokens: int, length: int, segment: int, **more: Tensor) -> MergeRouting:
    return MergeRouting(
        weight_GE=weight_GE, num_tokens=num_tokens, sequence_length=length, segment_length=segment, **more
    )


def bank_of(num_experts: int, activation: str = "gelu", **options: bool) -> ExpertBank:
    return randomise_parameters(ExpertBank(D_MODEL, 4, num_experts, activation, **options))


def test_merge_by_hand() -> None:
    stack_EIO = torch.tensor([[[1.0, 2.0]], [[5.0, -2.0]]])  # two experts of a 1 x 2 matrix
    weight_GE = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    assert merge_weights(weight_GE, stack_EIO).tolist() == [[[1.0, 2.0]], [[4.0, -1.0]]]


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_hot_weights_select_one_expert(activation: str) -> None:
    bank, x_TD = bank_of(3, activation), Tokens.draw(8).x_TD
    routing = merged_by(torch.eye(3)[[2, 0]], 8, 8, 4)
    expected_TD = torch.cat([bank.expert(x_TD[:4], 2), bank.expert(x_TD[4:], 0)])
    torch.testing.assert_close(routing.compute(BankPass(bank, x_TD)), expected_TD)


def test_merging_equals_mixing_if_experts_share_their_input_matrix() -> None:
    # With a common input matrix the experts are linear maps of the same hidden values.
    bank, x_TD = bank_of(4), Tokens.draw(6).x_TD
    with torch.no_grad():
        bank.w_in_EDF.copy_(bank.w_in_EDF[:1].expand_as(bank.w_in_EDF))
    weight_GE = torch.rand(2, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mixed_TD = sum(weight_GE.repeat_interleave(3, 0)[:, e : e + 1] * bank.expert(x_TD, e) for e in range(4))
    torch.testing.assert_close(merged_by(weight_GE, 6, 3, 3).compute(BankPass(bank, x_TD)), mixed_TD)
    with torch.no_grad():
        randomise_parameters(bank, seed=1)  # with different input matrices it is not
    mixed_TD = sum(weight_GE.repeat_interleave(3, 0)[:, e : e + 1] * bank.expert(x_TD, e) for e in range(4))
    assert not torch.allclose(merged_by(weight_GE, 6, 3, 3).compute(BankPass(bank, x_TD)), mixed_TD, atol=1e-2)


@given(st.integers(0, 3), st.integers(1, 7), st.integers(1, 8), st.booleans())
def test_segments_of_any_length_match_a_loop_over_tokens(batch: int, length: int, segment: int, masked: bool) -> None:
    generator = torch.Generator().manual_seed(batch + 10 * length + 100 * segment)
    num_tokens, segments_per_sequence = batch * length, -(-length // segment)
    weight_GE = torch.rand(batch * segments_per_sequence, 3, generator=generator).softmax(-1)
    valid_T = torch.rand(num_tokens, generator=generator) < 0.7 if masked else None
    routing = merged_by(weight_GE, num_tokens, length, segment, valid_T=valid_T)
    for token in range(num_tokens):
        row_E = weight_GE[token // length * segments_per_sequence + token % length // segment]
        expected_E = row_E if valid_T is None or valid_T[token] else torch.zeros(3)
        assert torch.equal(routing.weight_TE[token], expected_E)
    bank, x_TD = bank_of(3), Tokens.draw(num_tokens).x_TD
    torch.testing.assert_close(routing.compute(BankPass(bank, x_TD)), merge_loop(bank, x_TD, routing))


def test_deep_experts_are_merged_layer_by_layer() -> None:
    bank, x_TD = (
        DeepBank([bank_of(2), randomise_parameters(ExpertBank(D_MODEL, 4, 2, "gelu"), seed=1)]),
        Tokens.draw(4).x_TD,
    )
    routing = merged_by(torch.tensor([[0.3, 0.7]]), 4, 4, 4)
    first, second = bank.banks
    step_TD = merge_loop(first, x_TD, routing)
    expected_TD = step_TD + merge_loop(second, x_TD + step_TD, routing)
    torch.testing.assert_close(routing.compute(BankPass(bank, x_TD)), expected_TD)
    torch.testing.assert_close(merged_by(torch.eye(2)[1:], 4, 4, 4).compute(BankPass(bank, x_TD)), bank.expert(x_TD, 1))


def test_recomputation_is_bit_identical() -> None:
    results = []
    for recompute in (False, True):
        bank, x_TD = bank_of(3, "swiglu", recompute=recompute), Tokens.draw(8).x_TD.requires_grad_()
        weight_GE = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], requires_grad=True)
        y_TD = merged_by(weight_GE, 8, 4, 4).compute(BankPass(bank, x_TD))
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, weight_GE, *bank.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


@every_merging
def test_every_token_trains_every_expert_and_the_router(name: str) -> None:
    layer, tokens = Case(name).layer(), Tokens.draw(64, length=16)
    layer.router.expert_dropout = 0.0
    y_TD, _ = run(layer, tokens, training=True)
    y_TD[20].square().sum().backward()  # one token, in the second segment of its sequence
    assert (layer.bank.w_in_EDF.grad.flatten(1).norm(dim=1) > 1e-5).all()
    assert (layer.bank.w_out_EFD.grad.flatten(1).norm(dim=1) > 1e-5).all()
    assert layer.router.gate.weight_ED.grad.norm() > 1e-5


@every_merging
def test_one_expert_is_the_dense_network(name: str) -> None:
    layer, tokens = Case(name, 1).layer(), Tokens.draw(24, length=8)
    y_TD, _ = run(layer, tokens, training=True)
    torch.testing.assert_close(y_TD, layer.bank.expert(tokens.x_TD, 0))


@every_merging
def test_load_metrics_count_shares(name: str) -> None:
    valid_T = torch.arange(32) % 16 < 12
    tokens = dataclasses.replace(Tokens.draw(32, length=16), valid_T=valid_T)
    _, record = run(Case(name).layer(), tokens, training=False)
    assert record.routing.load_E.tolist() == [24] * 8
    assert record.routing.experts_per_token_T.tolist() == [8 * int(valid) for valid in valid_T]
    torch.testing.assert_close(record.importance_E.sum(), torch.tensor(24.0))
    torch.testing.assert_close(record.importance_E, record.routing.weight_TE[valid_T].sum(0))
    summary = summarise_load([LoadCount.from_record(record)])
    assert summary["load/entropy"] == pytest.approx(1)
    assert summary["load/drop_rate"] == summary["load/unserved"] == summary["load/dead_experts"] == 0


def test_smear_by_hand() -> None:
    router, tokens = Case("smear", 3).router(), Tokens.draw(10, length=5)
    valid_T = torch.tensor([True] * 5 + [True] * 3 + [False] * 2)
    routing = route(router, dataclasses.replace(tokens, valid_T=valid_T), training=False)

    def layer_norm(value_D: Tensor) -> Tensor:
        return (value_D - value_D.mean()) / (value_D.var(unbiased=False) + 1e-5).sqrt()

    for sequence, part in enumerate((slice(0, 5), slice(5, 8))):
        mean_D = layer_norm(tokens.x_TD[part].mean(0))
        logits_E = torch.stack([layer_norm(row_D) @ mean_D for row_D in router.gate.weight_ED]) / D_MODEL**0.5
        torch.testing.assert_close(routing.weight_GE[sequence], (router.scale * logits_E).softmax(0))


@pytest.mark.parametrize(("options", "expected"), [({}, 0.28), ({"init_std": 1.0}, 1.0)])
def test_initial_logits_of_smear_match_the_released_code(options: dict, expected: float) -> None:
    # A gain of 0.01 at 768 dimensions: 0.01 · √768 = .277. Here it is the same at every width.
    router_class = ROUTERS.get("smear").item
    for width in (64, 768):
        context = dataclasses.replace(build_context(16), d_model=width)
        router = router_class(router_class.Config(**options), context)
        init_weights(router, 0)
        tokens = dataclasses.replace(
            Tokens.draw(800, length=4), x_TD=torch.randn(800, width, generator=torch.Generator().manual_seed(1))
        )
        assert route(router, tokens, training=False).logits_GE.std().item() == pytest.approx(expected, rel=0.1)


def test_expert_dropout_redistributes_weights() -> None:
    router = Case("smear", 4, {"expert_dropout": 0.5}).router()
    draw_GE = torch.tensor([[0.1, 0.6, 0.9, 0.2], [0.0, 0.1, 0.2, 0.3]])  # all would be dropped in the second sequence
    weight_GE = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]])
    kept_GE = router._drop_experts(weight_GE, draw_GE)
    torch.testing.assert_close(kept_GE, torch.tensor([[0, 0.4, 0.6, 0], [0.1, 0.2, 0.3, 0.4]]))
    torch.testing.assert_close(router._drop_experts(torch.eye(4)[:1], draw_GE[:1])[0], torch.tensor([0, 0.5, 0.5, 0]))
    dropped = route(router, Tokens.draw(4000, length=10), training=True).weight_GE == 0
    assert dropped.float().mean() == pytest.approx(0.5 * (1 - 0.5**3), abs=0.05)  # none where all four would be dropped
    assert not (route(router, Tokens.draw(4000, length=10), training=False).weight_GE == 0).any()


def test_lory_by_hand() -> None:
    router, tokens = Case("lory", 8, {"segment_length": 4}).router(), Tokens.draw(20, length=10)
    routing = route(router, tokens, training=True)
    for sequence in (0, 1):
        x_LD = tokens.x_TD[10 * sequence : 10 * sequence + 10]
        logits = [router.first_E, *(router.gate(x_LD[start : start + 4].mean(0)) for start in (0, 4))]
        weight_SE = torch.stack(logits).softmax(-1)
        torch.testing.assert_close(routing.weight_GE[3 * sequence : 3 * sequence + 3], weight_SE)
    fresh = route(Case("lory").fresh_router(), tokens, training=True)
    torch.testing.assert_close(fresh.weight_TE[:4], torch.full((4, 8), 1 / 8))


@pytest.mark.parametrize("segment", [1, 3, 4, 16])
def test_segments_of_lory_depend_on_themselves_and_the_previous_one(segment: int) -> None:
    layer, length = Case("lory", options={"segment_length": segment}).layer(), 16
    tokens = Tokens.draw(length)
    y_TD, _ = run(layer, tokens, training=True)
    for changed in range(length):
        other_TD, _ = run(layer, tokens.with_other(torch.tensor([changed]), seed=7), training=True)
        differs_T = (other_TD - y_TD).abs().amax(-1) > 1e-6
        first = changed // segment * segment + segment
        expected_T = torch.zeros(length, dtype=torch.bool)
        expected_T[changed] = True
        expected_T[first : first + segment] = True
        assert torch.equal(differs_T, expected_T), changed


@pytest.mark.parametrize(
    ("name", "options", "rows", "gates"),
    [
        ("smear", {}, 1 + 8 / 16, 1 / 16),  # one row; one merge of 8 experts and one mean per 16 tokens
        ("lory", {}, 4 * (4 + 8) / 16, 3 / 16),  # four segments of four tokens; the last mean is not used
        ("lory", {"segment_length": 3}, 6 * (3 + 8) / 16, 5 / 16),  # six segments, the last one padded
        ("lory", {"segment_length": 99}, 1 + 8 / 16, 0),
    ],
)
def test_flops_match_torch(name: str, options: dict, rows: float, gates: float) -> None:
    layer = Case(name, options=options).layer().double()
    flops = int(rows * 2 * 2 * D_MODEL * 8) + int(gates * 2 * 8 * D_MODEL)
    assert layer.flops_per_token() == flops
    tokens = Tokens.draw(32, length=16, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        run(layer, tokens, training=True)
    assert counter.get_total_flops() == 32 * flops


@every_merging
@pytest.mark.parametrize("options", [{"depth": 2}, {"recompute": True, "expert_dropout": 0.3}])
def test_deep_and_recomputed_experts_have_finite_gradients(name: str, options: dict) -> None:
    config = config_of("every_n", name, {"ffn_width": 512}, **options)
    backbone = backbone_of(config)
    x_BLD, ctx = batch(training=True)
    y_BLD, _ = backbone(x_BLD, ctx)
    y_BLD.square().sum().backward()
    assert all(p.grad.isfinite().all() for layer in backbone.moe_layers() for p in layer.bank.parameters())


def test_merging_is_refused_with_expert_parallelism_causality_or_mixed_shapes(tmp_path) -> None:
    text = write_text(tmp_path)
    with pytest.raises(
        UsageError, match=r"^parallel\.expert=2: router 'lory' merges the parameters of all experts, so"
    ):
        check_cell(tiny_config(text, router="lory", parallel={"expert": 2}))
    check_cell(tiny_config(text, router="lory", parallel={"data": 2}))
    with pytest.raises(UsageError, match=r"^router\.name: 'smear' is not causal: the merge depends on the mean"):
        check_cell(tiny_config(text, router="smear"))
    check_cell(tiny_config(text, router="smear", allow_noncausal=True))
    layout = {"name": "heterogeneous", "num_experts": 6}
    with pytest.raises(UsageError, match=r"^router\.name: 'lory' sums the parameters of experts, and those of layout"):
        check_cell(tiny_config(text, router="lory", layout=layout))
    for name, options, message in (
        ("smear", {"expert_dropout": 1.0}, r"^router\.expert_dropout must be at least 0 and below 1, got 1\.0"),
        ("smear", {"init_std": 0.0}, r"^router\.init_std must be greater than 0, got 0\.0"),
        ("lory", {"segment_length": 0}, r"^router\.segment_length must be at least 1, or null, got 0"),
    ):
        router_class = ROUTERS.get(name).item
        with pytest.raises(UsageError, match=message):
            router_class.check(router_class.Config(**options), 8)


def test_default_segment_length_is_a_quarter_of_the_sequence() -> None:
    lory = ROUTERS.get("lory").item
    assert lory(lory.Config(), build_context(8)).segment_length == 4
    assert lory(lory.Config(), build_context(8, sequence_length=3)).segment_length == 1
    router = lory(lory.Config(segment_length=5), build_context(8))
    init_weights(router, 0)
    assert router.segment_length == 5
    assert not router.first_E.any()
