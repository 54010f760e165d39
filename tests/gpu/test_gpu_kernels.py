"""Triton's kernels at the sizes of `bench layer --only gpu`: the formula in fp64, and no wait for the device.

MOEBENCH_TEST_DEVICE=cpu tries the tests on small sizes; with MOEBENCH_KERNELS=interpret they run the kernels.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from support.device_values import distance, draw, no_wait
from torch import Tensor
from torch.nn import functional

from moebench.experts import elementwise
from moebench.experts.activation import activate
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.kernels import activation as activation_operators
from moebench.models.transformer import init_weights
from moebench.routing.kernels import backend
from moebench.routing.values import Routing

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
"""Norm of the difference to fp64 over the norm: rounding alone."""


def inner_bound(value: Tensor) -> float:
    """Return the bound of inner products: the kernels compute them in fp32, torch's operators round the products."""
    return 2e-6 if backend.uses_triton(value) else BOUND[value.dtype]


@pytest.fixture(autouse=True)
def triton_is_used(device: torch.device) -> None:
    if device.type == "cuda":
        assert backend.uses_triton(torch.zeros(1, device=device)), "Triton is not installed, or compiles nothing"


@pytest.fixture
def sizes(device: torch.device) -> tuple[int, int, int, int, int]:
    """Tokens, model width, hidden width, experts and experts per token."""
    return (16384, 2048, 1024, 64, 8) if device.type == "cuda" else (96, 32, 16, 8, 3)


def routing_of(sizes: tuple[int, ...], device: torch.device, load: str) -> Routing:
    """Return a rectangle: experts drawn at random, or one that all tokens have while half of the others are idle."""
    num_tokens, _, _, num_experts, top_k = sizes
    preference_TE = draw(num_tokens, num_experts, device=device)
    if load == "hot":
        preference_TE[:, 0] = 10.0
        preference_TE[:, num_experts // 2 :] = -10.0
    weight_TK = draw(num_tokens, top_k, device=device).softmax(-1)
    return Routing.from_top_k(preference_TE.topk(top_k, dim=-1).indices, weight_TK, num_experts=num_experts)


def formula(hidden_RF: Tensor, gated: bool) -> Tensor:
    if not gated:
        return functional.gelu(hidden_RF)
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    return functional.silu(gate_RF) * value_RF


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["swiglu", "gelu"])
def test_activation_kernels(gated: bool, dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> None:
    num_tokens, _, hidden, _, top_k = sizes
    rows = num_tokens * top_k
    hidden_RF = draw(rows, hidden * (1 + gated), device=device, dtype=dtype)
    grad_RF, weight_R = draw(rows, hidden, device=device, dtype=dtype), draw(rows, device=device)
    kernels = elementwise.activation_kernels(hidden_RF)
    with no_wait(device):
        active_RF = kernels.activate(hidden_RF, gated=gated)
        plain_RF = kernels.activate_backward(grad_RF, hidden_RF, gated=gated)
        results = weighted_backward(grad_RF.clone(), hidden_RF, weight_R, gated)
    for chunk in zip_chunks_of(8192, hidden_RF, grad_RF, weight_R, active_RF, plain_RF, *results):
        hidden, grad, weight, active, plain, grad_hidden, weighted, grad_weight = chunk
        exact, exact_weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
        expected = formula(exact, gated)
        product = expected * exact_weight.unsqueeze(-1)
        [plain_exact] = torch.autograd.grad(expected, exact, grad.double(), retain_graph=True)
        exact_hidden, exact_R = torch.autograd.grad(product, [exact, exact_weight], grad.double())
        bound = BOUND[dtype]
        assert distance(active, expected.detach()) < bound
        assert distance(plain, plain_exact) < bound
        assert distance(grad_hidden, exact_hidden) < bound
        assert distance(weighted, product.detach()) < bound
        assert distance(grad_weight, exact_R) < inner_bound(hidden_RF)


def weighted_backward(grad_RF: Tensor, hidden_RF: Tensor, weight_R: Tensor, gated: bool) -> tuple[Tensor, ...]:
    if backend.uses_triton(hidden_RF):
        from moebench.experts.kernels.gpu.activation import weighted_backward

        return weighted_backward(grad_RF, hidden_RF, weight_R, gated=gated)
    grad_hidden_RF, active_RF, inner_R = activation_operators.backward_with_inner(
        grad_RF, hidden_RF, None, weight_R.dtype, gated=gated
    )
    weight_R1 = weight_R.unsqueeze(-1).to(hidden_RF.dtype)
    return grad_hidden_RF * weight_R1, active_RF * weight_R1, inner_R


def zip_chunks_of(rows: int, *values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(value.split(rows) for value in values), strict=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_kernels(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> None:
    num_tokens, width, _, _, top_k = sizes
    rows = num_tokens * top_k
    x_TD = draw(num_tokens, width, device=device, dtype=dtype)
    value_RD = draw(rows, width, device=device, dtype=dtype)
    weight_N, row_N = draw(rows, device=device), draw(rows, device=device).argsort()
    token_R = row_N // top_k
    kernels = elementwise.row_kernels(x_TD)
    start_T = torch.arange(num_tokens + 1, device=device) * top_k
    with no_wait(device):
        gathered_RD = kernels.gather(x_TD, token_R)
        weighed_RD, inner_R = kernels.weigh_gathered(x_TD, value_RD, token_R, weight_N)
        rectangle = row_N.view(num_tokens, top_k), None, weight_N.view(num_tokens, top_k)
        sums = [kernels.sum_groups(value_RD, *each) for each in (rectangle, (row_N, start_T, weight_N))]
        plain_TD = kernels.sum_groups(value_RD, rectangle[0], None, None)
    assert torch.equal(gathered_RD, x_TD.index_select(0, token_R))
    assert torch.equal(*sums)  # one order of the sum
    for chunk in zip_chunks_of(4096, weighed_RD, inner_R, value_RD, token_R, weight_N):
        weighed, inner, value, token, weight = chunk
        exact = x_TD[token].double()
        assert distance(weighed, exact * weight.unsqueeze(-1)) < BOUND[dtype]
        assert distance(inner, (exact * value.double()).sum(-1)) < inner_bound(value_RD)
    for chunk in zip_chunks_of(1024, sums[0], plain_TD, *rectangle[::2]):
        summed, plain, row_TK, weight_TK = chunk
        exact = value_RD[row_TK].double()
        assert distance(summed, (exact * weight_TK.unsqueeze(-1)).sum(1)) < BOUND[dtype]
        assert distance(plain, exact.sum(1)) < BOUND[dtype]


def differentiate(compute: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Return output and gradients."""
    y_TD = compute()
    seed_TD = draw(*y_TD.shape, device=y_TD.device, dtype=y_TD.dtype)
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, seed_TD)]


@pytest.mark.parametrize("load", ["random", "hot", "holes"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_the_mixture_in_triton_equals_that_of_operators(
    activation: str, load: str, sizes: tuple[int, ...], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, width, hidden, num_experts, _ = sizes
    bank = ExpertBank(width, hidden, num_experts, activation)
    init_weights(bank, 0)
    bank.to(device, torch.bfloat16)
    routing = routing_of(sizes, device, load)
    if load == "holes":  # a list of assignments instead of a rectangle; some tokens have none
        routing = routing.keep(draw(len(routing.token_N), device=device) > 0.5)
    weight_N = routing.weight_N.clone().requires_grad_()
    object.__setattr__(routing, "weight_N", weight_N)
    x_TD = draw(routing.num_tokens, width, device=device, dtype=torch.bfloat16).requires_grad_()
    leaves = [x_TD, weight_N, *bank.parameters()]
    with no_wait(device):
        first = differentiate(lambda: bank.mixture(x_TD, routing), leaves)
    again = differentiate(lambda: bank.mixture(x_TD, routing), leaves)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))
    del again
    monkeypatch.setenv(backend.VARIABLE, "torch")
    operators = differentiate(lambda: bank.mixture(x_TD, routing), leaves)
    for ours, theirs in zip(first, operators, strict=True):
        assert ours.isfinite().all()
        assert distance(ours.flatten(), theirs.flatten()) < 2e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dense_network_equals_its_formula(dtype: torch.dtype, sizes: tuple[int, ...], device: torch.device) -> None:
    num_tokens, width, hidden, _, top_k = sizes
    dense = FeedForward(width, hidden * top_k, "swiglu")
    init_weights(dense, 0)
    dense.to(device, dtype)
    x_TD = draw(num_tokens, width, device=device, dtype=dtype).requires_grad_()
    leaves = [x_TD, *dense.parameters()]
    with no_wait(device):
        ours = differentiate(lambda: dense(x_TD), leaves)
    theirs = differentiate(lambda: formula(x_TD @ dense.w_in_DF, True) @ dense.w_out_FD, leaves)
    for value, expected in zip(ours, theirs, strict=True):
        assert distance(value, expected) < (1e-2 if dtype is torch.bfloat16 else 1e-4)


def test_shapes_that_fill_no_tile(device: torch.device) -> None:
    for shape in [(0, 6), (1, 2), (3, 74), (5, 2050), (2, 3, 10)]:
        hidden_XF = draw(*shape, device=device).requires_grad_()
        values = [activate(hidden_XF, "swiglu"), formula(hidden_XF, True)]
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(value.square().sum(), hidden_XF)[0] for value in values]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
