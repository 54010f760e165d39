"""The kernels written in Triton, run by its interpreter on the CPU, against torch's operators and the double loop."""

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.cases import Tokens, assert_same_gradients, randomise_parameters
from support.routing_strategies import crowded_routings, rectangles, routings
from torch import Tensor
from torch.nn import functional

from moebench.experts import elementwise
from moebench.experts.activation import activate
from moebench.experts.dispatch import DispatchPlan, combine, dispatch
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.kernels import activation as activation_operators
from moebench.experts.kernels import rows as row_operators
from moebench.experts.reference import double_loop
from moebench.experts.weighted_rows import WeightedExperts
from moebench.routing.kernels import backend
from moebench.routing.values import Routing

pytest.importorskip("triton")

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 16, 37, 1025]
"""The last one needs two blocks of a tile."""
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1e-2}}


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Iterator[None]:
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("where there is a GPU, tests/gpu/test_gpu_kernels.py runs the kernels")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv(backend.VARIABLE, "interpret")
        yield


def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(sizes))
    return torch.randn(*sizes, generator=generator).to(dtype)


def reference_activation(hidden_RF: Tensor, *, gated: bool) -> Tensor:
    if not gated:
        return functional.gelu(hidden_RF)
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    return functional.silu(gate_RF) * value_RF


def test_the_kernels_run_under_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD = torch.zeros(1, 1)
    assert elementwise.row_kernels(x_TD) is not row_operators
    assert elementwise.activation_kernels(x_TD) is not activation_operators
    assert elementwise.row_kernels(x_TD.double()) is row_operators  # they compute in fp32
    monkeypatch.delenv(backend.VARIABLE)
    assert elementwise.row_kernels(x_TD) is row_operators
    assert not backend.uses_triton(torch.zeros(1, device="meta"))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_activation_and_its_gradients(width: int, dtype: torch.dtype, gated: bool) -> None:
    hidden_RF, grad_RF = draw(5, width * (1 + gated), dtype=dtype) * 2, draw(5, width, dtype=dtype)
    weight_R = torch.tensor([0.5, 0.0, -2.0, 1e-30, 1.0])
    exact_RF, exact_R = hidden_RF.double().requires_grad_(), weight_R.double().requires_grad_()
    weighted_RF = exact_R.unsqueeze(-1) * reference_activation(exact_RF, gated=gated)
    expected = torch.autograd.grad(weighted_RF, [exact_RF, exact_R], grad_RF.double())
    [plain_RF] = torch.autograd.grad(reference_activation(exact_RF, gated=gated), exact_RF, grad_RF.double())
    for kernels in (elementwise.activation_kernels(hidden_RF), activation_operators):
        compare = {"check_dtype": False, **TOLERANCE[dtype]}
        active_RF = kernels.activate(hidden_RF, gated=gated)
        assert active_RF.dtype == dtype
        torch.testing.assert_close(active_RF, reference_activation(exact_RF, gated=gated), **compare)
        backward_RF = kernels.activate_backward(grad_RF, hidden_RF, gated=gated)
        torch.testing.assert_close(backward_RF, plain_RF, **compare)
    results = weighted_backward(grad_RF.clone(), hidden_RF, weight_R, gated)
    for ours, theirs in zip(results, (expected[0], weighted_RF, expected[1]), strict=True):
        scale = width**0.5 if theirs is expected[1] else 1.0
        torch.testing.assert_close(ours / scale, theirs / scale, **compare)
    assert results[2].dtype == torch.float32


def weighted_backward(grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, gated: bool) -> tuple[Tensor, ...]:
    from moebench.experts.kernels.gpu.activation import weighted_backward

    return weighted_backward(grad_RF, hidden_RF, weight_R, gated=gated)


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_operators_in_parts(gated: bool, dtype: torch.dtype, rows: int) -> None:
    width, wide = 6, torch.promote_types(dtype, torch.float32)
    hidden_RF, grad_RF = draw(rows, width * (1 + gated), dtype=dtype), draw(rows, width, dtype=dtype)
    exact_RF = hidden_RF.clone().double().requires_grad_()
    expected_RF = reference_activation(exact_RF, gated=gated)
    [exact_grad_RF] = torch.autograd.grad(expected_RF, exact_RF, grad_RF.double())
    compare = {"check_dtype": False, **TOLERANCE.get(dtype, {})}
    for keep in (False, True):
        active_RF, kept_RF = activation_operators.activate_in_parts(hidden_RF, gated=gated, keep=keep)
        torch.testing.assert_close(active_RF, expected_RF, **compare)
        grad_hidden_RF, active_RF, inner_R = activation_operators.backward_with_inner(
            grad_RF.clone(), hidden_RF, kept_RF if keep else None, wide, gated=gated
        )
        torch.testing.assert_close(grad_hidden_RF, exact_grad_RF, **compare)
        torch.testing.assert_close(active_RF, expected_RF, **compare)
        inner_compare = compare if dtype is not torch.bfloat16 else {"check_dtype": False, "rtol": 3e-2, "atol": 3e-2}
        torch.testing.assert_close(inner_R, (expected_RF * grad_RF).sum(-1), **inner_compare)
        assert inner_R.dtype == wide


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_large_hidden_units_stay_finite(gated: bool) -> None:
    hidden_RF = torch.tensor([[-1e4, -100.0, 100.0, 1e4], [1e4, -1e4, 0.0, -0.0]])
    kernels, grad_RF = elementwise.activation_kernels(hidden_RF), torch.ones(2, 2 if gated else 4)
    operators = activation_operators
    torch.testing.assert_close(kernels.activate(hidden_RF, gated=gated), operators.activate(hidden_RF, gated=gated))
    gradients = [each.activate_backward(grad_RF, hidden_RF, gated=gated) for each in (kernels, operators)]
    torch.testing.assert_close(*gradients)
    assert gradients[0].isfinite().all()


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 3, 12), (0, 12), (2, 0, 12)], ids=str)
def test_the_differentiable_activation_takes_any_shape(shape: tuple[int, ...]) -> None:
    hidden_XF = draw(*shape).requires_grad_()
    active_XF, expected_XF = activate(hidden_XF, "swiglu"), reference_activation(hidden_XF, gated=True)
    torch.testing.assert_close(active_XF, expected_XF)
    gradients = [torch.autograd.grad(each.square().sum(), hidden_XF)[0] for each in (active_XF, expected_XF)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathers_and_sums_of_rows(width: int, dtype: torch.dtype) -> None:
    x_TD, y_RD = draw(4, width, dtype=dtype), draw(7, width, dtype=dtype)
    token_R, weight_R = torch.tensor([3, 0, 0, 1, 3, 3, 1]), draw(7)
    kernels = elementwise.row_kernels(x_TD)
    assert torch.equal(kernels.gather(x_TD, token_R), x_TD[token_R])
    grad_RD, inner_R = kernels.weigh_gathered(x_TD, y_RD, token_R, weight_R)
    gathered_RD = x_TD[token_R].double()
    compare = {"check_dtype": False, **TOLERANCE[dtype]}
    torch.testing.assert_close(grad_RD, gathered_RD * weight_R.unsqueeze(-1), **compare)
    torch.testing.assert_close(inner_R, (gathered_RD * y_RD).sum(-1), check_dtype=False, rtol=1e-4, atol=1e-4)
    # Token 1 has no row, and the last two entries belong to no token.
    row_M, start_T = torch.tensor([6, 2, 2, 0, 5, 1, 4]), torch.tensor([0, 2, 2, 5])
    for weight_M in (None, weight_R):
        sum_TD = kernels.sum_groups(y_RD, row_M, start_T, weight_M)
        entries = y_RD[row_M].double() * (1 if weight_M is None else weight_M.unsqueeze(-1))
        expected_TD = torch.stack([entries[:2].sum(0), entries[0] * 0, entries[2:5].sum(0)])
        torch.testing.assert_close(sum_TD, expected_TD, **compare)
        rectangle_TD = kernels.sum_groups(
            y_RD, row_M[:6].view(2, 3), None, weight_M if weight_M is None else weight_M[:6].view(2, 3)
        )
        torch.testing.assert_close(rectangle_TD, entries[:6].view(2, 3, -1).sum(1), **compare)


def test_a_full_mixture_sums_many_rows() -> None:
    y_RD, weight_TK = draw(34, 8), draw(2, 17)  # more rows of a token than are unrolled
    row_TK = torch.randperm(34, generator=torch.Generator().manual_seed(0)).view(2, 17)
    expected_TD = (y_RD[row_TK] * weight_TK.unsqueeze(-1)).sum(1)
    torch.testing.assert_close(elementwise.row_kernels(y_RD).sum_groups(y_RD, row_TK, None, weight_TK), expected_TD)


few = settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
any_routing = st.one_of(crowded_routings, routings(holes=True), rectangles(holes=True))


@few
@given(any_routing, st.sampled_from(["gelu", "swiglu"]))
def test_experts_equal_the_double_loop(routing: Routing, activation: str) -> None:
    # The fused path, and dispatch, experts and combine as separate steps.
    width = 8
    bank = randomise_parameters(ExpertBank(width, 5, routing.num_experts, activation))
    x_TD = Tokens.draw(routing.num_tokens).x_TD[:, :width].contiguous().requires_grad_()
    weight_N = routing.weight_N.clone().requires_grad_()
    counted = replace(routing, weight_N=weight_N.where(routing.counted_N, 0.0))
    leaves = [x_TD, weight_N, *bank.parameters()]
    for compute in (bank.mixture, super(ExpertBank, bank).mixture):
        assert_same_gradients(compute(x_TD, counted), double_loop(bank, x_TD, counted), leaves, rtol=1e-4, atol=1e-5)


def test_one_expert_takes_all_tokens_in_bf16() -> None:
    routing = Routing.from_top_k(torch.full((9, 1), 2), torch.rand(9, 1), num_experts=4)
    bank = randomise_parameters(ExpertBank(8, 6, 4, "swiglu")).bfloat16()
    x_TD = draw(9, 8, dtype=torch.bfloat16).requires_grad_()
    y_TD, slow_TD = bank.mixture(x_TD, routing), double_loop(bank, x_TD, routing)
    torch.testing.assert_close(y_TD, slow_TD, rtol=2e-2, atol=2e-2)
    leaves = [x_TD, *bank.parameters()]
    gradients = [torch.autograd.grad(each.float().square().sum(), leaves) for each in (y_TD, slow_TD)]
    for ours, theirs in zip(*gradients, strict=True):
        assert (ours.float() - theirs.float()).norm() <= 3e-2 * theirs.float().norm()
    assert gradients[0][1][[0, 1, 3]].count_nonzero() == 0  # idle experts


def test_the_weights_of_bf16_rows_are_fp32() -> None:
    """1 + 2^-10 is 1 in bf16: only weights in fp32 tell the two sums apart."""
    routing = Routing.from_top_k(torch.tensor([[0, 1]]), torch.tensor([[1 + 2**-10, -1.0]]), num_experts=2)
    plan = DispatchPlan.of(routing)
    x_TD = torch.full((1, 16), 1024.0, dtype=torch.bfloat16)
    assert torch.equal(combine(dispatch(x_TD, plan), routing.weight_N, plan), torch.ones(1, 16, dtype=torch.bfloat16))


@pytest.mark.parametrize("load", [[3, 0, 4], [0, 7, 0], [0, 0, 0]], ids=["idle", "hot", "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_weighted_rows_are_those_of_torch(
    activation: str, dtype: torch.dtype, load: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    width, num_rows = 19, sum(load)
    x_RD, weight_R = draw(num_rows, 13, dtype=dtype).requires_grad_(), draw(num_rows).requires_grad_()
    w_in_EDF = (0.3 * draw(3, 13, width * (1 + (activation == "swiglu")), dtype=dtype)).requires_grad_()
    w_out_EFD = (0.3 * draw(3, width, 13, dtype=dtype)).requires_grad_()
    experts = WeightedExperts(w_in_EDF=w_in_EDF, w_out_EFD=w_out_EFD, activation=activation)
    results = []
    for choice in ("interpret", "torch"):
        monkeypatch.setenv(backend.VARIABLE, choice)
        y_RD = experts(x_RD, weight_R, torch.tensor(load))
        leaves = [x_RD, weight_R, w_in_EDF, w_out_EFD]
        results.append([y_RD, *torch.autograd.grad(y_RD.float().square().sum(), leaves)])
    for ours, theirs in zip(*results, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 2e-2
        assert (ours.float() - theirs.float()).norm() <= bound * theirs.float().norm()
