"""The losses of PonderNet and their gradients, against numbers by hand and the enumeration of all steps."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, run
from support.halting_layers import layer_of, states
from torch import Tensor

from moebench.experts.bank_pass import divide_by_rms
from moebench.experts.layer import MoELayer
from moebench.routing.routers.ponder_net import compute_hazards, compute_mean_steps


def test_the_truncated_and_normalised_prior_by_hand() -> None:
    # λ = 1/2, three steps: 4/7, 2/7, 1/7. Stopping once reached: 4/7, (2/7)/(3/7), 1. Mean 1·4/7 + 2·2/7 + 3/7.
    assert compute_hazards(0.5, 3) == pytest.approx([4 / 7, 2 / 3, 1])
    assert compute_mean_steps(0.5, 3) == pytest.approx(11 / 7)
    assert compute_mean_steps(0.2, 1000) == pytest.approx(5)


def geometric_of(hazard_N: list[float], prior: float, num_tokens: int) -> tuple[float, float]:
    """Return the mean of `geometric` over tokens that stop with these probabilities, and its standard error."""
    router = Case("ponder_net", len(hazard_N) + 1, {"prior": prior}).router()
    logits_N = torch.tensor(hazard_N).logit()
    before_T = torch.zeros(num_tokens, dtype=torch.bool)
    draws_TN = torch.rand(num_tokens, len(hazard_N), generator=torch.Generator().manual_seed(0)) < torch.tensor(
        hazard_N
    )
    stopped_TN = draws_TN.cumsum(1) > 0
    ran_TE = ~torch.cat([before_T[:, None], stopped_TN], 1)
    extras = {"logits_T": logits_N.expand(num_tokens, -1), "ran_T": ran_TE}
    _, record = run(Case("ponder_net").layer(), Tokens.draw(1), training=True)
    values = []
    for part in range(20):
        cut = {key: value[part::20] for key, value in extras.items()}
        value = router.losses(replace(record, routing=replace(record.routing, token_extras=cut)))["geometric"]
        values.append(value.item())
    value_P = torch.tensor(values)
    return value_P.mean().item(), value_P.std().item() / 20**0.5


def test_geometric_is_the_kl_from_p_to_the_prior() -> None:
    # λ = .3, .6, 1: p = (.3, .42, .28) against (4, 2, 1)/7: Σ p ln(p/g), not Σ g ln(g/p).
    p, g = (0.3, 0.42, 0.28), (4 / 7, 2 / 7, 1 / 7)
    forward = sum(a * math.log(a / b) for a, b in zip(p, g, strict=True))
    reverse = sum(b * math.log(b / a) for a, b in zip(p, g, strict=True))
    mean, error = geometric_of([0.3, 0.6], 0.5, 40000)
    assert mean == pytest.approx(forward, abs=5 * error)
    assert abs(mean - reverse) > 10 * error


@pytest.mark.parametrize("prior", [0.2, 0.5, 0.9])
def test_geometric_is_0_when_p_is_the_prior(prior: float) -> None:
    assert geometric_of(compute_hazards(prior, 4)[:-1], prior, 100)[0] == pytest.approx(0, abs=1e-6)


def exact_gradients(layer: MoELayer, x_D: Tensor, pull_D: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of Σ p_n L_n and of KL(p || prior) of one token, all steps enumerated."""
    h_ND = torch.stack(states(layer.bank, x_D[None])).squeeze(1)
    num_steps = len(h_ND)
    hazard_N = (layer.router.gate(divide_by_rms(h_ND[:-1])) + layer.router.bias).sigmoid().squeeze(-1)
    hazard_N = torch.cat([hazard_N, torch.ones(1)])
    p_N = hazard_N * torch.cat([torch.ones(1), (1 - hazard_N[:-1]).cumprod(0)])
    prior = layer.router.prior
    g_N = prior * (1 - prior) ** torch.arange(num_steps)
    leaves = list(layer.parameters())
    task = (p_N * ((h_ND - x_D) @ pull_D)).sum()
    kl = (p_N * (p_N / (g_N / g_N.sum())).log()).sum()
    return tuple(list(torch.autograd.grad(loss, leaves, retain_graph=True)) for loss in (task, kl))


def test_gradients_of_drawn_steps_are_unbiased() -> None:
    # Equal tokens draw steps of their own: the mean over many is the gradient of the enumerated expectation.
    layer, num_tokens, num_batches = layer_of("ponder_net", 3), 2000, 40
    with torch.no_grad():
        layer.router.bias.fill_(-0.5)
    tokens = Tokens.draw(num_tokens)
    pull_D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(4))
    same = dataclasses.replace(tokens, x_TD=tokens.x_TD[:1].expand(num_tokens, -1).clone())
    exact = exact_gradients(layer, tokens.x_TD[0], pull_D)
    leaves = list(layer.parameters())
    draws: tuple[list[list[Tensor]], list[list[Tensor]]] = ([], [])
    for seed in range(num_batches):
        y_TD, record = run(layer, same, training=True, seed=seed)
        loss_T = y_TD @ pull_D
        task = (loss_T + layer.router.objective(replace(record, token_loss_T=loss_T.detach()))).mean()
        for drawn_gradients, loss in zip(draws, (task, layer.router.losses(record)["geometric"]), strict=True):
            drawn_gradients.append(list(torch.autograd.grad(loss, leaves, retain_graph=True)))
    for drawn_gradients, expected in zip(draws, exact, strict=True):
        for index, gradient in enumerate(expected):
            each = torch.stack([gradients[index] for gradients in drawn_gradients])
            error = each.std(0) / num_batches**0.5
            assert ((each.mean(0) - gradient).abs() <= 5 * error + 2e-3 * gradient.abs() + 1e-5).all()
            assert gradient.norm() > 10 * error.norm(), "the estimate says something"


def test_the_score_term_vanishes_where_all_tokens_lose_alike() -> None:
    layer = layer_of("ponder_net")
    _, record = run(layer, Tokens.draw(32), training=True)
    loss = layer.router.objective(replace(record, token_loss_T=torch.full((32,), 3.0))).sum()
    assert all(not g.any() for g in torch.autograd.grad(loss, list(layer.router.parameters())))
