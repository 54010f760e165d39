"""Biases of experts: every way of computing them is that of a slow loop, and one expert is the dense network."""

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, cases_of, randomise_parameters, run, slow_mixture
from torch import Tensor
from torch.autograd import grad

from moebench.experts.activation import activate
from moebench.experts.biased import BiasedExpertBank, add_expert_bias
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.projection import HeadBank, ProjectionBank
from moebench.routing.linear_map import find_linear_maps
from moebench.routing.mixing import MergeRouting
from moebench.routing.values import Routing

CASES = [Case("top_k"), Case("switch"), Case("expert_choice"), Case("soft_moe"), Case("ponder_net"), Case("top_p")]


def bank_of(num_experts: int = 8, activation: str = "gelu", **options: bool) -> BiasedExpertBank:
    bank: BiasedExpertBank = randomise_parameters(BiasedExpertBank(D_MODEL, 6, num_experts, activation, **options))
    return bank


def layer_of(case: Case, activation: str, **options: bool) -> MoELayer:
    return MoELayer(
        case.router(),
        bank_of(case.num_experts, activation, **options),
        LayerOptions(experts_per_token=case.experts_per_token),
    )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_is_the_slow_loop_in_values_and_gradients(case: Case, activation: str, recompute: bool) -> None:
    layer = layer_of(case, activation, recompute=recompute)
    tokens = Tokens.draw(12, length=6)
    y_TD, record = run(layer, tokens, training=True)
    slow_TD = slow_mixture(layer.bank, tokens.x_TD, record.kept)
    torch.testing.assert_close(y_TD, slow_TD, rtol=1e-4, atol=1e-5)
    weights = list(layer.bank.parameters())
    for ours, slow in zip(grad(y_TD.sum(), weights, retain_graph=True), grad(slow_TD.sum(), weights), strict=True):
        torch.testing.assert_close(ours, slow, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["smear", "lory"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_merged_experts_have_merged_biases(name: str, activation: str) -> None:
    layer = layer_of(Case(name), activation)
    tokens = Tokens.draw(12, length=6)
    y_TD, record = run(layer, tokens, training=False)
    assert isinstance(record.kept, MergeRouting)
    bank, rows = layer.bank, []
    for x_D, weight_E in zip(tokens.x_TD, record.kept.weight_TE, strict=True):
        w_in_DF, b_in_F, w_out_FD, b_out_D = (
            torch.tensordot(weight_E, stack_EX, dims=1)
            for stack_EX in (bank.w_in_EDF, bank.b_in_EF, bank.w_out_EFD, bank.b_out_ED)
        )
        rows.append(activate(x_D @ w_in_DF + b_in_F, activation) @ w_out_FD + b_out_D)
    torch.testing.assert_close(y_TD, torch.stack(rows), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in cases_of(1) if case.name in ("switch", "top_k")], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_one_expert_with_biases_is_the_dense_network(case: Case, activation: str) -> None:
    layer = layer_of(case, activation)
    dense, bank = FeedForward(D_MODEL, 6, activation, bias=True), layer.bank
    pairs = {"w_in_DF": "w_in_EDF", "b_in_F": "b_in_EF", "w_out_FD": "w_out_EFD", "b_out_D": "b_out_ED"}
    with torch.no_grad():
        for name, stack in pairs.items():
            getattr(dense, name).copy_(getattr(bank, stack)[0])
    tokens = Tokens.draw(9)
    y_TD, _ = run(layer, tokens, training=False)
    torch.testing.assert_close(y_TD, dense(tokens.x_TD))
    ours = grad(y_TD.square().sum(), [getattr(bank, stack) for stack in pairs.values()])
    theirs = grad(dense(tokens.x_TD).square().sum(), [getattr(dense, name) for name in pairs])
    for stack, one in zip(ours, theirs, strict=True):
        torch.testing.assert_close(stack[0], one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("load", [[2, 0, 3], [0, 0, 0], [5, 0, 0], [1, 1, 1]])
def test_the_bias_of_sorted_rows_and_its_gradient(load: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x_RO = torch.randn(sum(load) + 2, 4, generator=generator, requires_grad=True)  # two rows belong to no expert
    bias_EO = torch.randn(3, 4, generator=generator, requires_grad=True)
    y_RO = add_expert_bias(x_RO, bias_EO, torch.tensor(load))
    expert_R = [expert for expert, number in enumerate(load) for _ in range(number)]
    slow_RO = x_RO[: len(expert_R)] + bias_EO[torch.tensor(expert_R, dtype=torch.int64)]
    assert torch.equal(y_RO[: len(expert_R)], slow_RO)
    weight_RO = torch.randn(len(expert_R), 4, generator=generator)
    for ours, slow in zip(
        grad((y_RO[: len(expert_R)] * weight_RO).sum(), (x_RO, bias_EO)),
        grad((slow_RO * weight_RO).sum(), (x_RO, bias_EO)),
        strict=True,
    ):
        torch.testing.assert_close(ours, slow)


def test_biases_start_at_0_and_weights_as_without_them() -> None:
    plain, biased = ExpertBank(D_MODEL, 6, 3, "gelu"), bank_of(3)
    for bank in (plain, biased):
        bank.init_weights(torch.Generator().manual_seed(1))
    assert torch.equal(plain.w_in_EDF, biased.w_in_EDF)
    assert torch.equal(plain.w_out_EFD, biased.w_out_EFD)
    assert not biased.b_in_EF.any()
    assert not biased.b_out_ED.any()
    x_TD = Tokens.draw(6).x_TD
    expert_TK = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [1, 0], [2, 0]])
    routing = Routing.from_top_k(expert_TK, torch.full((6, 2), 0.5), num_experts=3)
    torch.testing.assert_close(biased.mixture(x_TD, routing), plain.mixture(x_TD, routing))


def test_experts_in_attention_have_biases() -> None:
    projections = randomise_parameters(ProjectionBank(D_MODEL, 10, 3, has_bias=True))
    heads = randomise_parameters(HeadBank(D_MODEL, 4, 3, 1.0, bias="all"))
    x_RD, load_E = Tokens.draw(5).x_TD, torch.tensor([2, 0, 3])

    def slow(x_RI: Tensor, weight_EIO: Tensor, bias_EO: Tensor) -> Tensor:
        expert_R = torch.tensor([0, 0, 2, 2, 2])
        return torch.einsum("ri,rio->ro", x_RI, weight_EIO[expert_R]) + bias_EO[expert_R]

    expected_RO = slow(x_RD, projections.weight_EDO, projections.b_out_EO)
    torch.testing.assert_close(projections(x_RD, load_E), expected_RO)
    torch.testing.assert_close(projections.expert(x_RD[2:], 2), expected_RO[2:])
    query_RH = heads.queries(x_RD, load_E)
    torch.testing.assert_close(query_RH, slow(x_RD, heads.w_query_EDH, heads.b_query_EH))
    torch.testing.assert_close(heads.outputs(query_RH, load_E), slow(query_RH, heads.w_out_EHD, heads.b_out_ED))
    assert HeadBank(D_MODEL, 4, 3, 1.0, bias="qkv").b_out_ED is None


def test_stacked_biases_are_vectors_for_the_optimizer() -> None:
    banks = [bank_of(), HeadBank(8, 4, 3, 1.0, bias="all"), ProjectionBank(8, 8, 2, has_bias=True)]
    for bank in banks:
        maps, vectors = find_linear_maps(bank)
        biases = {id(parameter) for name, parameter in bank.named_parameters() if name.startswith("b_")}
        assert vectors == biases
        assert maps.keys() == {id(parameter) for parameter in bank.parameters()} - biases
