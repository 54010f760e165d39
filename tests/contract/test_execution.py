"""Execution of the layer: bf16, the GPU path, compilation, recomputation, saved tensors."""

import importlib
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import D_MODEL, Case, Tokens, assert_same_gradients, randomise_parameters, run
from support.routing_strategies import crowded_routings, rectangles, routings
from torch import Tensor
from torch.library import opcheck

from moebench.bench.layer.saved import count_saved_bytes
from moebench.experts import dispatch, fused_operator, grouped
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.fused import compute_fused_mixture
from moebench.experts.kernels import grouped_mm
from moebench.experts.kernels.groups import Groups
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import double_loop
from moebench.routing.context import RouteContext
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.values import Routing

pytestmark = pytest.mark.usefixtures("kernels_for_few_rows")
any_routing = st.one_of(crowded_routings, routings(holes=True), rectangles(holes=True))


def bank_for(routing: Routing, dtype: torch.dtype = torch.float32, activation: str = "swiglu", **options) -> ExpertBank:
    return randomise_parameters(ExpertBank(D_MODEL, 8, routing.num_experts, activation, **options)).to(dtype)


@given(any_routing, st.sampled_from(["gelu", "swiglu"]))
def test_bf16_matches_the_fp32_loop_within_its_precision(routing: Routing, activation: str) -> None:
    # Relative error of each tensor against the fp32 loop.
    exact, half = bank_for(routing, activation=activation), bank_for(routing, torch.bfloat16, activation)
    with torch.no_grad():
        for ours, theirs in zip(half.parameters(), exact.parameters(), strict=True):
            theirs.copy_(ours)
    results = []
    for bank, compute in ((half, half.mixture), (exact, lambda x_TD, r: double_loop(exact, x_TD, r))):
        x_TD = Tokens.draw(routing.num_tokens, dtype=torch.bfloat16).x_TD.to(next(bank.parameters()).dtype)
        x_TD.requires_grad_()
        weight_N = (routing.weight_N.bfloat16().float() * routing.counted_N).requires_grad_()
        y_TD = compute(x_TD, replace(routing, weight_N=weight_N))
        leaves = [x_TD, weight_N, *bank.parameters()]
        gradients = torch.autograd.grad(y_TD.float().square().sum(), leaves, allow_unused=True)
        results.append([y_TD, *(torch.zeros(()) if g is None else g for g in gradients)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours.float() - theirs).norm() <= 2e-2 * theirs.norm() + 1e-6


@given(any_routing, st.sampled_from(["gelu", "swiglu"]))
def test_recomputation_is_bit_identical(routing: Routing, activation: str) -> None:
    results = []
    for recompute in (False, True):
        bank = bank_for(routing, activation=activation, recompute=recompute)
        x_TD = Tokens.draw(routing.num_tokens).x_TD.requires_grad_()
        y_TD = bank.mixture(x_TD, routing)
        results.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, *bank.parameters()])])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


class PackedKernel:
    """A kernel that leaves rows behind the last expert's uninitialised, as grouped_mm does on a GPU."""

    @staticmethod
    def fits(groups: Groups, x_RI: Tensor, other: Tensor) -> bool:
        return True

    @staticmethod
    def product(groups: Groups, x_RI: Tensor, weight_EIO: Tensor) -> Tensor:
        out_RO = x_RI.new_full((x_RI.shape[0], weight_EIO.shape[2]), torch.nan)
        for rows, weight, out in zip(groups.split(x_RI), weight_EIO, groups.split(out_RO), strict=True):
            out.copy_(rows @ weight)
        return out_RO

    @staticmethod
    def weight_gradient(groups: Groups, x_RI: Tensor, grad_RO: Tensor) -> Tensor:
        pairs = zip(groups.split(x_RI), groups.split(grad_RO), strict=True)
        return torch.stack([rows.T @ grad for rows, grad in pairs])


def without_loads_on_host(load_E: Tensor, *, pad_for: torch.dtype | None = None) -> Groups:
    return Groups(load_E=load_E, offset_E=load_E.cumsum(0, dtype=torch.int32), loads=None, capacity=None)


def use_gpu_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the code path that does not read loads from the device, on tensors that can be read."""
    monkeypatch.setattr(grouped, "KERNELS", (PackedKernel,))
    for module in (grouped, dispatch):
        monkeypatch.setattr(module, "group_rows", without_loads_on_host)


@given(any_routing)
def test_unused_rows_do_not_affect_the_output(routing: Routing) -> None:
    # On a GPU every assignment has a row, those that are not kept too.
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_gpu_path(monkeypatch)
        bank = bank_for(routing)
        x_TD = Tokens.draw(routing.num_tokens).x_TD.requires_grad_()
        weight_N = routing.weight_N.clone().requires_grad_()
        counted = replace(routing, weight_N=weight_N.where(routing.counted_N, 0.0))
        leaves = [x_TD, weight_N, *bank.parameters()]
        for compute in (bank.mixture, super(ExpertBank, bank).mixture):
            slow_TD = double_loop(bank, x_TD, counted)
            assert_same_gradients(compute(x_TD, counted), slow_TD, leaves, rtol=1e-4, atol=1e-5)


@given(st.integers(1, 12), st.integers(1, 12), st.lists(st.integers(0, 5), min_size=1, max_size=4))
def test_unsupported_widths_are_padded(width_in: int, width_out: int, loads: list[int]) -> None:
    # Where the device alone knows the loads: the values, and both products of the backward pass.
    groups = without_loads_on_host(torch.tensor(loads))
    generator = torch.Generator().manual_seed(0)
    x_RI = torch.randn(sum(loads), width_in, generator=generator)
    grad_RO = torch.randn(sum(loads), width_out, generator=generator)
    weight_EIO = torch.randn(len(loads), width_in, width_out, generator=generator)
    expected = [x @ w for x, w in zip(x_RI.split(loads), weight_EIO, strict=True)]
    torch.testing.assert_close(grouped.product(groups, x_RI, weight_EIO), torch.cat(expected))
    back = [g @ w.T for g, w in zip(grad_RO.split(loads), weight_EIO, strict=True)]
    torch.testing.assert_close(grouped.product(groups, grad_RO, weight_EIO.transpose(1, 2)), torch.cat(back))
    outer = [x.T @ g for x, g in zip(x_RI.split(loads), grad_RO.split(loads), strict=True)]
    torch.testing.assert_close(grouped.weight_gradient(groups, x_RI, grad_RO), torch.stack(outer))


@pytest.mark.parametrize("width", [32, 29])
@pytest.mark.parametrize("factor", [None, 1.25])
@pytest.mark.parametrize("router", ["switch", "top_k", "expert_choice"])
def test_layer_does_not_synchronise_with_the_device(
    router: str, factor: float | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Meta tensors have no values, so reading one would raise. They do not support autocast. The compiler, which takes
    # note of these functions when it is imported, must not see the substitutes.
    importlib.import_module("torch._dynamo")
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    with torch.device("meta"):
        router_class = ROUTERS.get(router).item
        config = router_class.Config(**({"jitter": 0.0} if router == "switch" else {}))
        layer = MoELayer(
            router_class(config, RouterBuildContext(d_model=64, num_experts=8)),
            ExpertBank(64, width, 8, "swiglu").bfloat16(),
            LayerOptions(experts_per_token=router_class.experts_per_token(config, 8), capacity=Capacity(train=factor)),
        )
        x_TD = torch.randn(40, 64, dtype=torch.bfloat16, requires_grad=True)
    ctx = RouteContext(training=True, generator=torch.Generator(), sequence_length=20)
    y_TD, record = layer(x_TD, ctx)
    y_TD.sum().backward()
    assert y_TD.shape == (40, 64)
    assert x_TD.grad is not None
    assert layer.bank.w_in_EDF.grad.shape == (8, 64, 2 * width)
    with pytest.raises((RuntimeError, NotImplementedError)):
        record.num_dropped.__index__()


@pytest.mark.parametrize(
    ("case", "factor", "half"),
    [
        (Case("top_k"), None, True),
        (Case("top_k"), 0.75, False),
        (Case("switch", options={"jitter": 0.0}), None, False),
        (Case("expert_choice"), 0.75, False),
    ],
    ids=str,
)
def test_compiled_layer_is_one_graph_and_equals_the_eager_layer(case: Case, factor: float | None, half: bool) -> None:
    results = []
    torch._dynamo.reset()  # each test compiles: torch limits how often
    for compiled in (False, True):
        layer, tokens = case.layer(capacity=Capacity(train=factor), activation="swiglu"), Tokens.draw(64)
        tokens.x_TD.requires_grad_()
        call = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            y_TD, record = call(tokens.x_TD, tokens.context(training=True))
        y_TD.float().square().sum().backward()
        results.append([y_TD, record.kept.load_E, tokens.x_TD.grad, *(p.grad for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        # In bf16 the compiler adds the gradients of the input in another precision.
        assert (ours - theirs).float().norm() <= (1e-2 if half else 1e-5) * theirs.float().norm()


@pytest.mark.parametrize("kept", [None, torch.tensor([True, False, True, True, False, True])], ids=["all", "some"])
def test_the_operator_keeps_the_contract_of_torch_library(kept: Tensor | None) -> None:
    # Its schema, its autograd registration, its shapes without values, and all of them in a traced graph.
    bank = randomise_parameters(ExpertBank(D_MODEL, 8, 4, "swiglu"))
    x_TD, weight_N = torch.randn(6, D_MODEL, requires_grad=True), torch.rand(6, requires_grad=True)
    lists = torch.arange(6), torch.tensor([0, 3, 3, 3, 1, 0]), kept, 1
    arguments = (x_TD, weight_N, bank.w_in_EDF, bank.w_out_EFD, *lists, "swiglu")
    assert set(opcheck(fused_operator.mixture, arguments).values()) == {"SUCCESS"}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_operator_has_the_promised_strides_where_rows_are_padded(
    monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    # On a GPU, widths that are no multiple of 16 bytes are padded, and the results are slices.
    use_gpu_path(monkeypatch)
    monkeypatch.setattr(grouped, "KERNELS", (grouped_mm,))
    bank = randomise_parameters(ExpertBank(D_MODEL, 10, 4, activation))
    tensors = torch.randn(6, D_MODEL), torch.rand(6), bank.w_in_EDF.detach(), bank.w_out_EFD.detach()
    lists = torch.arange(6), torch.tensor([0, 3, 3, 3, 1, 0]), None, 1, activation
    utilities = ("test_schema", "test_faketensor")
    results = opcheck(fused_operator.mixture, (*tensors, *lists), test_utils=utilities)
    y_TD, *saved = fused_operator.mixture(*tensors, *lists)
    arguments = (torch.ones_like(y_TD), *tensors, *saved, *lists)
    backward_results = opcheck(fused_operator.mixture_backward, arguments, test_utils=utilities)
    assert {*results.values(), *backward_results.values()} == {"SUCCESS"}


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_saved_tensors_are_minimal(activation: str) -> None:
    num_tokens, d_model, hidden, top_k = 128, 64, 64 if activation == "swiglu" else 256, 2
    expert_TK = torch.arange(num_tokens * top_k).view(num_tokens, top_k) % 8  # even loads: no row is padding
    routing = Routing.from_top_k(expert_TK, torch.rand(num_tokens, top_k), num_experts=8)
    bank = randomise_parameters(ExpertBank(d_model, hidden, 8, activation))
    x_TD = torch.randn(num_tokens, d_model)
    weights = bank.w_in_EDF, bank.w_out_EFD
    saved = {
        recompute: count_saved_bytes(
            lambda again=recompute: compute_fused_mixture(x_TD, routing, *weights, activation, recompute=again),
            [x_TD, routing.weight_N, *bank.parameters()],
        )
        for recompute in (False, True)
    }
    rows, pre = num_tokens * top_k, hidden * (2 if activation == "swiglu" else 1)
    assert saved[True] == 4 * rows * pre  # the hidden units before the activation and nothing else
    assert saved[False] == saved[True] + 4 * rows * hidden
    # Saved by gather, grouped_mm, activation, grouped_mm and the weighted sum.
    plain = 4 * rows * (2 * d_model + pre + hidden * (2 if activation == "swiglu" else 1))
    assert saved[True] <= 0.4 * plain


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("factor", [None, 1.0])
def test_layer_on_a_gpu_does_not_synchronise_and_matches_the_loop(factor: float | None) -> None:
    case = Case("top_k")
    layer = case.layer(capacity=Capacity(train=factor), activation="swiglu").cuda()
    tokens = Tokens.draw(64)
    x_TD = tokens.x_TD.cuda().requires_grad_()
    ctx = RouteContext(training=True, generator=torch.Generator("cuda").manual_seed(0), sequence_length=64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y_TD, record = layer(x_TD, ctx)
        y_TD.float().square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    slow_TD = double_loop(layer.bank, x_TD, record.kept)
    assert (y_TD.float() - slow_TD).norm() <= 2e-2 * slow_TD.norm()


def test_padding_and_capacity_counts_with_block_recomputation() -> None:
    from torch.utils.checkpoint import checkpoint

    case, results = Case("top_k"), []
    for recompute in (False, True):
        layer, tokens = case.layer(capacity=Capacity(train=0.5)), Tokens.draw(32)
        tokens.x_TD.requires_grad_()
        records = []

        def forward(x_TD, layer=layer, tokens=tokens, records=records):
            y_TD, record = layer(x_TD, tokens.context(training=True))
            records.append(record)
            return y_TD

        y_TD = (
            checkpoint(forward, tokens.x_TD, use_reentrant=False) if recompute else run(layer, tokens, training=True)[0]
        )
        y_TD.square().sum().backward()
        results.append([y_TD, tokens.x_TD.grad, *(p.grad for p in layer.parameters())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))
