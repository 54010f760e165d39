"""Edge-case inputs for every router: outputs are finite, valid and differentiable."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from support.cases import D_MODEL, MODES, Case, Tokens, default_cases, run
from support.router_checks import assert_well_formed, compute_raw_losses, note_in_failure

from moebench.routing.values import SoftRouting


def scale_tokens(factor: float) -> Tokens:
    """Return tokens whose logits have this scale."""
    tokens = Tokens.draw(64, length=16)
    return replace(tokens, x_TD=factor * tokens.x_TD)


def duplicate_tokens() -> Tokens:
    """Return tokens that each occur twice, so that all rankings tie."""
    tokens = Tokens.draw(32)
    return tokens.take(torch.arange(32).repeat_interleave(2), length=16)


def pad_tokens() -> Tokens:
    """Return a batch with a half-padded sequence and one of padding only."""
    valid_T = torch.arange(64) % 16 < torch.tensor([16, 8, 0, 16]).repeat_interleave(16)
    return replace(Tokens.draw(64, length=16), valid_T=valid_T)


INPUTS: dict[str, Callable[[], Tokens]] = {
    "logits of 1e4": lambda: scale_tokens(1e4),
    "inputs of -1e4 and 1e4": lambda: replace(scale_tokens(1), x_TD=1e4 * scale_tokens(1).x_TD.sign()),
    "ties": duplicate_tokens,
    "all equal": lambda: replace(scale_tokens(1), x_TD=torch.ones(64, D_MODEL)),
    "all zero": lambda: scale_tokens(0),
    "no token": lambda: Tokens.draw(0),
    "one token": lambda: Tokens.draw(1),
    "fewer tokens than experts": lambda: Tokens.draw(3),
    "bf16": lambda: Tokens.draw(64, length=16, dtype=torch.bfloat16),
    "padding": pad_tokens,
}


@pytest.mark.parametrize("case", default_cases(), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_edge_case_input(case: Case, mode: str) -> None:
    for name, make in INPUTS.items():
        with note_in_failure(input=name):
            assert_valid(case, make(), training=MODES[mode])


def assert_valid(case: Case, tokens: Tokens, *, training: bool) -> None:
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
