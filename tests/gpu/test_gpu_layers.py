"""Every router and layout on a GPU: the loop agrees, bf16 stays within its precision, and a repeat changes no bit."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, cases_of, default_cases, slow_mixture
from torch import Tensor

from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import MoELayer
from moebench.models.transformer import init_weights
from moebench.routing.context import RouteContext
from moebench.routing.values import LayerRecord

pytestmark = pytest.mark.gpu

TIGHT = Capacity(train=0.75, eval=0.75)


def to_device(tokens: Tokens, device: torch.device) -> Tokens:
    """Return the tokens on a device."""
    return replace(tokens, x_TD=tokens.x_TD.to(device), token_id_T=tokens.token_id_T.to(device))


def context(tokens: Tokens, *, training: bool) -> RouteContext:
    """Return a context whose generator is where the tokens are."""
    made = tokens.context(training=training)
    return replace(made, generator=torch.Generator(tokens.x_TD.device).manual_seed(0))


def train_layer(layer: MoELayer, tokens: Tokens, *, half: bool = False) -> tuple[LayerRecord, list[Tensor]]:
    """Return the record of a training pass, and output and gradients of all parameters and of the input."""
    layer.train()
    x_TD = tokens.x_TD.clone().requires_grad_()
    mixed = torch.autocast(x_TD.device.type, dtype=torch.bfloat16) if half else nullcontext()
    with mixed:
        y_TD, record = layer(x_TD, context(tokens, training=True))
    return record, [y_TD, *gradients(y_TD, [x_TD, *leaves_of(layer)])]


def leaves_of(layer: MoELayer) -> list[Tensor]:
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def gradients(y_TD: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    grads = torch.autograd.grad(y_TD.float().square().sum(), leaves, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, grads, strict=True)]


def layer_of(case: Case, device: torch.device, **options: Any) -> MoELayer:
    layer = case.layer(**options)
    return layer.to(device)


@pytest.mark.parametrize("capacity", [Capacity(), TIGHT], ids=["dropless", "tight"])
@pytest.mark.parametrize("case", cases_of(8), ids=str)
def test_the_loop_agrees(case: Case, capacity: Capacity, device: torch.device) -> None:
    layer, tokens = layer_of(case, device, capacity=capacity, activation="swiglu"), to_device(Tokens.draw(24), device)
    layer.train()
    x_TD = tokens.x_TD.clone().requires_grad_()
    y_TD, record = layer(x_TD, context(tokens, training=True))
    slow_TD = slow_mixture(layer.bank, x_TD, record.kept)
    torch.testing.assert_close(y_TD, slow_TD, rtol=1e-4, atol=1e-4)
    leaves = [x_TD, *leaves_of(layer)]
    for ours, theirs in zip(gradients(y_TD, leaves), gradients(slow_TD, leaves), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", default_cases(), ids=str)
def test_bf16_is_the_loop_within_its_precision(case: Case, device: torch.device) -> None:
    layer, tokens = layer_of(case, device, activation="swiglu"), to_device(Tokens.draw(64), device)
    record, (y_TD, *grads) = train_layer(layer, tokens, half=True)
    slow_TD = slow_mixture(layer.bank, tokens.x_TD, record.kept)
    assert y_TD.device.type == device.type
    assert (y_TD.float() - slow_TD).norm() <= 2e-2 * slow_TD.norm() + 1e-6
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", default_cases(), ids=str)
def test_a_repeat_changes_no_bit(case: Case, half: bool, device: torch.device) -> None:
    layer, tokens = layer_of(case, device, capacity=TIGHT), to_device(Tokens.draw(96, length=32), device)
    first, again = (train_layer(layer, tokens, half=half)[1] for _ in range(2))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(first, again, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("hidden", [508, 12, 1])
def test_widths_that_are_no_multiple_of_16_bytes_are_padded(hidden: int, activation: str, device: torch.device) -> None:
    """Else the grouped kernels refuse them, and a loop waits for the loads."""
    layer = Case("top_k").layer()
    layer.bank = ExpertBank(D_MODEL, hidden, layer.bank.num_experts, activation)
    init_weights(layer.bank, 0)
    layer.to(device)
    tokens = to_device(Tokens.draw(64), device)
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        record, (y_TD, *grads) = train_layer(layer, tokens, half=True)
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    slow_TD = slow_mixture(layer.bank, tokens.x_TD, record.kept)
    assert (y_TD.float() - slow_TD).norm() <= 2e-2 * slow_TD.norm() + 1e-6
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("case", default_cases(), ids=str)
def test_evaluation_routes_as_on_a_cpu(case: Case, device: torch.device) -> None:
    if case.facts.causality.draws_in_evaluation:
        pytest.skip("draws in evaluation: the generators of two devices differ")
    tokens = Tokens.draw(64, length=16)
    layer = case.layer().eval()
    with torch.no_grad():
        near_TD, _ = layer(tokens.x_TD, tokens.context(training=False))
        there = to_device(tokens, device)
        far_TD, _ = layer.to(device)(there.x_TD, context(there, training=False))
    torch.testing.assert_close(far_TD.cpu(), near_TD, rtol=1e-4, atol=1e-4)  # another expert is another output
