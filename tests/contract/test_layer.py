"""The fast MoE layer against a slow double loop over tokens and experts."""

from dataclasses import replace

import pytest
import torch
from support.case_selection import parametrize_cases
from support.cases import (
    D_MODEL,
    Case,
    ReplayRouter,
    Tokens,
    assert_same_gradients,
    cases_of,
    list_cases,
    run,
    slow_mixture,
    tabulate_weights,
)
from torch import Tensor

from moebench.experts.capacity import Capacity
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.grouped import grouped_matmul
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import double_loop
from moebench.models.transformer import init_weights
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.values import AnyRouting, Routing

pytestmark = pytest.mark.usefixtures("kernels_for_few_rows")
FACTORS = (None, 0.25, 1.0, 1.25, 10.0)
ACTIVATIONS = ("gelu", "swiglu")


@parametrize_cases(cases_of(8), factor=FACTORS, activation=ACTIVATIONS, slow_values={"factor": ("1.0", "10.0")})
def test_fast_layer_equals_the_double_loop(case: Case, factor: float | None, activation: str) -> None:
    layer = case.layer(capacity=Capacity(train=factor, eval=factor), activation=activation)
    tokens = Tokens.draw(24)
    tokens.x_TD.requires_grad_()
    y_TD, record = run(layer, tokens, training=True)
    leaves = [tokens.x_TD, *(p for p in layer.parameters() if p.requires_grad)]
    slow_TD = slow_mixture(layer.bank, tokens.x_TD, record.kept)
    assert_same_gradients(y_TD, slow_TD, leaves, rtol=1e-5, atol=1e-5)
    if not case.is_chain:  # in a chain the routing depends on the experts, so it cannot be replayed
        assert_same_in_fp64(layer, tokens, record.kept)


def to_fp64_leaves(kept: AnyRouting) -> tuple[AnyRouting, list[Tensor]]:
    """Return the routing with fp64 weights, and these weights as leaves."""
    if isinstance(kept, SoftRouting):
        leaves = [weight_BLS.detach().double().requires_grad_() for weight_BLS in (kept.dispatch_BLS, kept.combine_BLS)]
        return replace(kept, dispatch_BLS=leaves[0], combine_BLS=leaves[1]), leaves
    if isinstance(kept, MergeRouting):
        weight_GE = kept.weight_GE.detach().double().requires_grad_()
        return replace(kept, weight_GE=weight_GE), [weight_GE]
    kept = kept.compact()
    weight_N = kept.weight_N.detach().double().requires_grad_()
    replay = Routing(
        token_N=kept.token_N,
        expert_N=kept.expert_N,
        weight_N=weight_N,
        num_tokens=kept.num_tokens,
        num_experts=kept.num_experts,
        top_k=kept.top_k,
    )
    return replay, [weight_N]


def assert_same_in_fp64(layer: MoELayer, tokens: Tokens, kept: AnyRouting) -> None:
    """Replay the routing with fp64 weights: only the order of summation may differ."""
    replay, weights = to_fp64_leaves(kept)
    bank = ExpertBank(D_MODEL, layer.bank.w_out_EFD.shape[1], kept.num_experts, layer.bank.activation).double()
    bank.load_state_dict(layer.bank.state_dict())
    fp64_layer = MoELayer(ReplayRouter(replay), bank, LayerOptions(experts_per_token=1))
    x_TD = tokens.x_TD.detach().double().requires_grad_()
    y_TD, _ = fp64_layer(x_TD, tokens.context(training=True))
    assert y_TD.dtype == torch.float64
    leaves = [x_TD, *weights, *bank.parameters()]
    assert_same_gradients(y_TD, slow_mixture(fp64_layer.bank, x_TD, replay), leaves, rtol=1e-10, atol=1e-10)


def build_routing(expert_N: list[int], *, num_tokens: int, num_experts: int) -> Routing:
    """Route token i to expert_N[i] with weight i + 1, as a list rather than a rectangle."""
    return Routing(
        token_N=torch.arange(len(expert_N)),
        expert_N=torch.tensor(expert_N, dtype=torch.int64),
        weight_N=torch.arange(1.0, len(expert_N) + 1),
        num_tokens=num_tokens,
        num_experts=num_experts,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("expert_N", "num_tokens", "num_experts"),
    [
        ([], 0, 4),  # no tokens
        ([], 5, 4),  # tokens, none of them served
        ([2] * 6, 6, 4),  # one hot expert
        ([3, 0, 3], 3, 4),  # empty experts between used ones, fewer tokens than experts
        ([1], 1, 9),  # a single row
        ([0, 1, 2], 7, 3),  # the last tokens unserved
    ],
)
def test_uneven_loads(expert_N: list[int], num_tokens: int, num_experts: int, dtype: torch.dtype) -> None:
    routing = build_routing(expert_N, num_tokens=num_tokens, num_experts=num_experts)
    bank = ExpertBank(D_MODEL, 8, num_experts, "gelu").to(dtype)
    init_weights(bank, 0)
    layer = MoELayer(ReplayRouter(routing), bank, LayerOptions(experts_per_token=1))
    tokens = Tokens.draw(num_tokens, dtype=dtype)
    tokens.x_TD.requires_grad_()
    y_TD, _ = run(layer, tokens, training=True)
    assert y_TD.shape == tokens.x_TD.shape
    leaves = [tokens.x_TD, *bank.parameters()]
    assert_same_gradients(y_TD, double_loop(layer.bank, tokens.x_TD, routing), leaves, rtol=1e-5, atol=1e-5)
    assert not y_TD[len(expert_N) :].any()
    y_TD.sum().backward()  # experts without rows have zero gradients, not None, so that all ranks agree
    assert all(parameter.grad is not None for parameter in bank.parameters())


@pytest.mark.parametrize("width", [8, 6])  # 6 floats are not a multiple of 16 bytes and take the loop over experts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_matmul_equals_one_matmul_per_expert(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(10, 8, generator=generator).to(dtype)
    weight_EIO = torch.randn(4, 8, width, generator=generator).to(dtype)
    y_RO = grouped_matmul(x_RI, weight_EIO, torch.tensor([3, 0, 6, 1]))
    expected = torch.cat([x_RI[:3] @ weight_EIO[0], x_RI[3:9] @ weight_EIO[2], x_RI[9:] @ weight_EIO[3]])
    torch.testing.assert_close(y_RO, expected)


def full_cases() -> list[Case]:
    """Return the cases with one expert that serve every token."""
    serving = [case for case in list_cases(1) if case.router().rows_per_token(case.experts_per_token) >= 1]
    return [case for case in serving if not case.options.get("pass_through")]


@parametrize_cases(full_cases(), activation=ACTIVATIONS)
def test_one_expert_is_the_dense_network(case: Case, activation: str) -> None:
    layer, dense = case.layer(activation=activation), FeedForward(D_MODEL, 8, activation)
    with torch.no_grad():
        dense.w_in_DF.copy_(layer.bank.w_in_EDF[0])
        dense.w_out_FD.copy_(layer.bank.w_out_EFD[0])
    tokens = Tokens.draw(24)
    y_TD, record = run(layer, tokens, training=True)
    assert record.kept.load_E.tolist() == [24]
    weight_T1 = record.kept.weight_N[record.kept.token_N.argsort()].unsqueeze(-1)
    torch.testing.assert_close(y_TD, weight_T1 * dense(tokens.x_TD))
    scores_TE = record.routing.scores_TE
    if scores_TE is None or torch.allclose(scores_TE.sum(-1), torch.ones(24)):  # scores that sum to 1
        torch.testing.assert_close(weight_T1, torch.ones(24, 1))


@parametrize_cases(list_cases())
def test_capacity_applies_per_mode(case: Case) -> None:
    layer = case.layer(capacity=Capacity(train=0.25))
    _, training = run(layer, Tokens.draw(64), training=True)
    _, evaluating = run(layer, Tokens.draw(64), training=False)
    assert training.num_dropped > 0
    assert evaluating.num_dropped == 0
    assert training.kept.load_E.max() <= 64 * layer.experts_per_token / 4 / 8


def test_dropped_tokens_have_zero_output() -> None:
    layer = Case("switch").layer(capacity=Capacity(train=0.25))
    y_TD, record = run(layer, Tokens.draw(64), training=True)
    unserved_T = record.kept.experts_per_token_T == 0
    assert unserved_T.sum() == record.num_dropped
    assert not y_TD[unserved_T].any()
    assert (y_TD[~unserved_T].abs().sum(-1) > 0).all()


def test_scaling_the_experts_scales_the_output() -> None:
    layer, tokens = Case("switch").layer(), Tokens.draw(24)
    before_TD, _ = run(layer, tokens, training=False)
    with torch.no_grad():
        layer.bank.w_out_EFD *= 4
    after_TD, _ = run(layer, tokens, training=False)
    assert torch.equal(after_TD, 4 * before_TD)


def test_jitter_never_reaches_the_experts() -> None:
    # If the experts saw jittered input, the result would differ from the loop over the clean input.
    layer, tokens = Case("switch", options={"jitter": 0.3}).layer(), Tokens.draw(24)
    y_TD, record = run(layer, tokens, training=True)
    torch.testing.assert_close(y_TD, double_loop(layer.bank, tokens.x_TD, record.kept))


@pytest.mark.parametrize("rectangle", [True, False], ids=["rectangle", "list"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_gradcheck_of_dispatch_and_combine(rectangle: bool, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    expert_TK = torch.rand(5, 3, generator=generator).topk(top_k, dim=-1).indices
    x_TD = torch.randn(5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight_TK = torch.rand(5, top_k, generator=generator, dtype=torch.float64, requires_grad=True)

    def dispatch_and_combine(x_TD: Tensor, weight_TK: Tensor) -> Tensor:
        routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=3)
        if not rectangle:
            routing = routing.keep(torch.arange(5 * top_k) != 3)
        plan = DispatchPlan.of(routing)
        return combine(dispatch(x_TD, plan).sin(), routing.weight_N, plan)

    assert torch.autograd.gradcheck(dispatch_and_combine, (x_TD, weight_TK))


# Without chains, where the router reads the output of half-precision experts.
@parametrize_cases([case for case in cases_of(8) if not case.is_chain])
def test_routing_under_autocast_equals_fp32(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(24)
    y_TD, record = run(layer, tokens, training=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half_TD, half = run(layer, tokens, training=False)
    assert torch.equal(tabulate_weights(half.routing), tabulate_weights(record.routing))
    torch.testing.assert_close(half_TD.float(), y_TD, rtol=0.1, atol=0.1)
