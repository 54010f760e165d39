"""Training of routers other than through the weights: by objectives over token losses and by their own losses."""

import dataclasses

import pytest
import torch
from support.cases import NUM_TOKENS, Case, Tokens, default_cases, run
from support.router_checks import learns_from_own_loss

from moebench.routing.router import Router

every_router = pytest.mark.parametrize("case", default_cases(), ids=str)


@every_router
def test_own_losses_or_objective_reach_the_declared_parameters(case: Case) -> None:
    layer = case.layer()
    _, record = run(layer, Tokens.draw(64), training=True)
    record = dataclasses.replace(record, token_loss_T=torch.rand(64, generator=torch.Generator().manual_seed(5)))
    learned_T = layer.router.objective(record)
    total = torch.zeros(()) if learned_T is None else learned_T.mean()
    total = total + sum(layer.router.losses(record).values())
    own_loss_parameters = {name: p for name, p in layer.router.named_parameters() if learns_from_own_loss(case, name)}
    assert bool(own_loss_parameters) is bool(case.facts.trained_by_own_loss)
    if own_loss_parameters:
        gradients = torch.autograd.grad(total, list(own_loss_parameters.values()))
        assert all(gradient.norm() > 1e-4 for gradient in gradients), list(own_loss_parameters)


@every_router
def test_objective_has_one_value_per_token(case: Case) -> None:
    for num_tokens in NUM_TOKENS:
        layer = case.layer()
        _, record = run(layer, Tokens.draw(num_tokens), training=True)
        record = dataclasses.replace(record, token_loss_T=torch.ones(num_tokens))
        learned_T = layer.router.objective(record)
        assert (learned_T is not None) is (case.router_class.objective is not Router.objective)
        if learned_T is not None:
            assert learned_T.shape == (num_tokens,)
            assert learned_T.isfinite().all()
