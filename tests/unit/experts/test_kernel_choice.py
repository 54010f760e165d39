"""MOEBENCH_KERNELS: what each choice computes with, and what is refused where it cannot be used."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moebench.bench.machine import choose_device
from moebench.compatibility import check_cell
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experts.activation import activate
from moebench.experts.elementwise import activation_kernels
from moebench.experts.kernels import activation
from moebench.routing.kernels import backend


def choose(monkeypatch: pytest.MonkeyPatch, choice: str, *missing: str) -> None:
    """Set the choice; `missing`: modules that are not installed."""
    monkeypatch.setenv(backend.VARIABLE, choice)
    monkeypatch.setattr(backend, "is_installed", lambda module: module not in missing)


@pytest.mark.parametrize("choice", ["", "auto", "torch"])
def test_a_cpu_has_the_operators_of_torch(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, choice, "triton", "liger_kernel")
    assert activation_kernels(torch.zeros(1, 2)) is activation
    backend.require_kernels(on_gpu=False)
    backend.require_kernels(on_gpu=True)


@pytest.mark.parametrize(
    ("choice", "missing", "on_gpu", "message"),
    [
        ("ligr", (), True, r"^MOEBENCH_KERNELS: 'ligr' is unknown\. Did you mean 'liger'\? Allowed: auto, interpret, "),
        ("0", (), True, r"^MOEBENCH_KERNELS: '0' is unknown\. Allowed: auto, interpret, liger, torch, triton$"),
        (
            "triton",
            (),
            False,
            r"'triton' was given, and its kernels need a GPU \(allowed on a CPU: auto, torch, interpret\)$",
        ),
        (
            "liger",
            (),
            False,
            r"'liger' was given, and its kernels need a GPU \(allowed on a CPU: auto, torch, interpret\)$",
        ),
        ("triton", ("triton",), True, r"'triton' was given, and triton is not installed \(allowed: auto, torch\)$"),
        ("interpret", ("triton",), False, r"'interpret' was given, and triton is not installed"),
        ("liger", ("liger_kernel",), True, r"'liger' was given, and liger-kernel is not installed \(pip install "),
    ],
)
def test_what_a_choice_lacks_is_named(
    choice: str, missing: tuple[str, ...], on_gpu: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(monkeypatch, choice, *missing)
    with pytest.raises(UsageError, match=message):
        backend.require_kernels(on_gpu=on_gpu)
    if not on_gpu:
        with pytest.raises(UsageError, match=message):
            activate(torch.zeros(1, 2), "swiglu")
        assert activation_kernels(torch.zeros(1, 2, dtype=torch.float64)) is activation


def test_the_interpreter_must_be_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "interpret")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="'interpret' was given without TRITON_INTERPRET=1"):
        backend.require_kernels(on_gpu=False)


def test_cells_and_benchmarks_are_refused_before_they_start(monkeypatch: pytest.MonkeyPatch) -> None:
    choose(monkeypatch, "liger")
    message = r"^MOEBENCH_KERNELS: 'liger' was given, and its kernels need a GPU"
    with pytest.raises(UsageError, match=message):
        check_cell(resolve({"train": {"device": "cpu"}}))
    with pytest.raises(UsageError, match=message):
        choose_device("cpu")


def formula(hidden_RF: Tensor, weight_R: Tensor) -> Tensor:
    gate_RF, value_RF = hidden_RF.chunk(2, dim=-1)
    return weight_R.unsqueeze(-1) * functional.silu(gate_RF) * value_RF


@pytest.mark.parametrize("width", [1, 37, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_kernels_of_liger_equal_the_formula(width: int, dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs Triton's interpreter, which cannot multiply in bf16 as these kernels do")
    from moebench.experts.kernels.gpu import activation as ours
    from moebench.experts.kernels.gpu import liger

    generator = torch.Generator().manual_seed(width)
    hidden_RF, grad_RF = (torch.randn(5, size, generator=generator).to(dtype) for size in (2 * width, width))
    weight_R = torch.tensor([0.5, 0.0, -2.0, 1e-3, 1.0])
    exact_RF, exact_R = hidden_RF.double().requires_grad_(), weight_R.double().requires_grad_()
    weighted_RF = formula(exact_RF, exact_R)
    plain_RF = formula(exact_RF, torch.ones_like(exact_R))
    (grad_hidden_RF,) = torch.autograd.grad(plain_RF, exact_RF, grad_RF.double(), retain_graph=True)
    weighted = torch.autograd.grad(weighted_RF, [exact_RF, exact_R], grad_RF.double())
    bound: dict[str, Any] = {"check_dtype": False, "rtol": 2e-3, "atol": 5e-3}
    if dtype is torch.float32:
        bound |= {"rtol": 1e-5, "atol": 1e-5}
    for kernels in (liger, ours):
        torch.testing.assert_close(kernels.activate(hidden_RF, gated=True), plain_RF, **bound)
        torch.testing.assert_close(kernels.activate_backward(grad_RF, hidden_RF, gated=True), grad_hidden_RF, **bound)
        results = kernels.weighted_backward(grad_RF.clone(), hidden_RF, weight_R, gated=True)
        torch.testing.assert_close(results[0], weighted[0], **bound)
        torch.testing.assert_close(results[1], weighted_RF, **bound)
        torch.testing.assert_close(results[2] / width**0.5, weighted[1] / width**0.5, **bound)
        assert results[2].dtype == torch.float32
    for gated in (True, False):  # no rows, and gelu
        empty_RF = hidden_RF[:0, : width * (1 + gated)]
        assert liger.activate(empty_RF, gated=gated).shape == (0, width)
        assert liger.activate_backward(empty_RF[:, :width], empty_RF, gated=gated).shape == empty_RF.shape
    assert torch.equal(liger.activate(hidden_RF, gated=False), ours.activate(hidden_RF, gated=False))
