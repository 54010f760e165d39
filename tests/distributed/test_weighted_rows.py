"""Experts on two processes that get the weights of their rows, against the step-by-step path and one process."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support.process_group import Mesh, Shape
from torch import Tensor

from moebench.experts.bank import Bank
from moebench.experts.feed_forward import ExpertBank
from moebench.models.transformer import init_weights
from moebench.parallel.exchange import ExpertExchange
from moebench.parallel.packed_rows import pack_rows, unpack_rows
from moebench.routing.values import Routing

NUM_TOKENS, D_MODEL, WIDTH, NUM_EXPERTS, TOP_K = 33, 24, 16, 6, 2


def choose_experts(load: str, generator: torch.Generator) -> Tensor:
    """Return the experts of each token: all but the last one used, one used by every token, or all of one process."""
    if load == "empty":
        return torch.rand(NUM_TOKENS, NUM_EXPERTS - 1, generator=generator).argsort(1)[:, :TOP_K]
    if load == "hot":
        return torch.tensor([4, 1]).expand(NUM_TOKENS, -1)
    return torch.rand(NUM_TOKENS, NUM_EXPERTS // 2, generator=generator).argsort(1)[:, :TOP_K] + NUM_EXPERTS // 2


def build(activation: str, local: slice = slice(None)) -> ExpertBank:
    """Return the bank with its experts `local`."""
    bank = ExpertBank(D_MODEL, WIDTH, NUM_EXPERTS, activation)
    init_weights(bank, 0)
    for name, parameter in list(bank.named_parameters()):
        setattr(bank, name, torch.nn.Parameter(parameter.detach()[local].clone()))
    return bank


def count_saved_bytes(compute: Callable[[], Tensor], left_out: Any) -> tuple[Tensor, int]:
    """Return the output, and the bytes that its backward pass needs, each storage once, without `left_out`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_TD = compute()
    known = {tensor.untyped_storage().data_ptr() for tensor in left_out}
    return y_TD, sum(size for address, size in storages.items() if address not in known)


def train_bank(mesh: Mesh | None, activation: str, load: str, is_bf16: bool, is_fused: bool) -> dict[str, Any]:
    """Return the output of the tokens of a rank (the rank's seed), its gradients, and the bytes saved."""
    results: dict[str, Any] = {}
    ranks = range(2) if mesh is None else [mesh.rank]
    bank = build(activation)
    if mesh is not None:
        assert mesh.expert_group is not None
        size = NUM_EXPERTS // 2
        bank = build(activation, slice(mesh.rank * size, (mesh.rank + 1) * size))
        bank.exchange = ExpertExchange(mesh.expert_group, mesh.traffic, overlap=True)
    for rank in ranks:
        generator = torch.Generator().manual_seed(rank)
        x_TD = torch.randn(NUM_TOKENS, D_MODEL, generator=generator).requires_grad_()
        weight_TK = torch.rand(NUM_TOKENS, TOP_K, generator=generator).requires_grad_()
        kept_N = torch.rand(NUM_TOKENS * TOP_K, generator=generator) < 0.9
        expert_TK = choose_experts(load, generator)
        routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=NUM_EXPERTS).keep(kept_N)
        mixture = bank.mixture if is_fused else partial(Bank.mixture, bank)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
            y_TD, saved = count_saved_bytes(partial(mixture, x_TD, routing), [x_TD, weight_TK, *bank.parameters()])
        torch.manual_seed(rank)
        (y_TD.float() * torch.randn(y_TD.shape)).sum().backward()
        results |= {
            f"y {rank}": y_TD.detach(),
            f"x {rank}": x_TD.grad,
            f"weight {rank}": weight_TK.grad,
            "saved": saved,
        }
    return results | {name: parameter.grad for name, parameter in bank.named_parameters()}


def compute_everywhere(mesh: Mesh | None) -> dict[tuple[Any, ...], dict[str, Any]]:
    cases = [
        (activation, load, is_bf16, is_fused)
        for activation in ("swiglu", "gelu")
        for load in ("empty", "hot", "far")
        for is_bf16 in (False, True)
        for is_fused in ((True,) if mesh is None else (True, False))
    ]
    return {case: train_bank(mesh, *case) for case in cases}


@pytest.fixture(scope="module")
def results() -> tuple[Any, list[Any]]:
    return compute_everywhere(None), Shape(1, 2).run(compute_everywhere)


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("load", ["empty", "hot", "far"])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_two_processes_compute_what_one_does(activation: str, load: str, is_bf16: bool, results: Any) -> None:
    alone, by_rank = results
    expected = alone[activation, load, is_bf16, True]
    for is_fused in (True, False):
        ours = [each[activation, load, is_bf16, is_fused] for each in by_rank]
        tensors = {name: value for each in ours for name, value in each.items() if " " in name}
        tensors |= {name: torch.cat([each[name] for each in ours]) for name in ("w_in_EDF", "w_out_EFD")}
        for name, value in tensors.items():
            difference = (value.float() - expected[name].float()).norm() / expected[name].float().norm().clamp(min=1e-6)
            assert difference <= (1e-2 if is_bf16 else 1e-6), name


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_less_is_saved(activation: str, results: Any) -> None:
    _, by_rank = results
    for case in [key for key in by_rank[0] if key[0] == activation and key[3]]:
        saved = [sum(each[*case[:3], is_fused]["saved"] for each in by_rank) for is_fused in (True, False)]
        assert saved[0] < saved[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_keep_their_bits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_dtype = torch.promote_types(dtype, torch.float32)
    x_RI = torch.randn(7, 5, generator=generator).to(dtype).requires_grad_()
    weight_R = (torch.randn(7, generator=generator).to(weight_dtype) * 1e30).requires_grad_()
    order_R = torch.randperm(7, generator=generator)
    rows_RI, weights_R = unpack_rows(pack_rows(x_RI, weight_R), weight_dtype, order_R, order_R.argsort())
    assert torch.equal(rows_RI, x_RI[order_R])
    assert torch.equal(weights_R, weight_R[order_R])
    grad_RI, grad_R = torch.randn_like(rows_RI), torch.randn_like(weights_R)
    ours = torch.autograd.grad([rows_RI, weights_R], [x_RI, weight_R], [grad_RI, grad_R])
    assert torch.equal(ours[0], grad_RI[order_R.argsort()])
    assert torch.equal(ours[1], grad_R[order_R.argsort()])
