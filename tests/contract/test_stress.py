"""Inputs at the edge, for every router: what comes out is finite, legal, and can be differentiated."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from contract.test_routers import assert_well_formed
from support.cases import D_MODEL, MODES, Case, Tokens, compute_raw_losses, default_cases, note_in_failure, run

from moebench.routing.values import SoftRouting


def scaled(factor: float) -> Tokens:
    """Return tokens whose logits are of that size."""
    tokens = Tokens.draw(64, length=16)
    return replace(tokens, x_TD=factor * tokens.x_TD)


def twins() -> Tokens:
    """Return tokens of which each is there twice: every rank among tokens ties."""
    tokens = Tokens.draw(32)
    return tokens.take(torch.arange(32).repeat_interleave(2), length=16)


def padded() -> Tokens:
    """Return a batch with a sequence that is half padding, and one that is nothing else."""
    valid_T = torch.arange(64) % 16 < torch.tensor([16, 8, 0, 16]).repeat_interleave(16)
    return replace(Tokens.draw(64, length=16), valid_T=valid_T)


INPUTS: dict[str, Callable[[], Tokens]] = {
    "logits of 1e4": lambda: scaled(1e4),
    "inputs of -1e4 and 1e4": lambda: replace(scaled(1), x_TD=1e4 * scaled(1).x_TD.sign()),
    "ties": twins,
    "all equal": lambda: replace(scaled(1), x_TD=torch.ones(64, D_MODEL)),
    "all zero": lambda: scaled(0),
    "no token": lambda: Tokens.draw(0),
    "one token": lambda: Tokens.draw(1),
    "fewer tokens than experts": lambda: Tokens.draw(3),
    "bf16": lambda: Tokens.draw(64, length=16, dtype=torch.bfloat16),
    "padding": padded,
}


@pytest.mark.parametrize("case", default_cases(), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_an_input_at_the_edge(case: Case, mode: str) -> None:
    for name, make in INPUTS.items():
        with note_in_failure(input=name):
            assert_routed(case, make(), training=MODES[mode])


def assert_routed(case: Case, tokens: Tokens, *, training: bool) -> None:
    layer, x_TD = case.layer(), tokens.x_TD.requires_grad_()
    layer.bank.to(x_TD.dtype)
    y_TD, record = run(layer, replace(tokens, x_TD=x_TD), training=training)
    routing = record.routing
    if not (isinstance(routing, SoftRouting) and tokens.valid_T is not None):  # sums are 0 for padding
        assert_well_formed(routing)
    if tokens.valid_T is not None:
        assert not routing.experts_per_token_T[~tokens.valid_T].any()
    losses = compute_raw_losses(layer.router, record)
    total = y_TD.float().square().mean() if y_TD.numel() else y_TD.float().sum()
    total = total + sum(losses.values())
    assert torch.isfinite(total), losses
    if not total.requires_grad:
        return
    total.backward()
    for parameter, tensor in [("x", x_TD), *layer.named_parameters()]:
        assert tensor.grad is None or torch.isfinite(tensor.grad).all(), parameter
