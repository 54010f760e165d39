"""Experts one behind another: ACT and PonderNet, each against numbers by hand, enumeration, or a slow loop."""

import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import (
    D_MODEL,
    Case,
    Tokens,
    assert_same_gradients,
    randomise_parameters,
    route,
    run,
    tabulate_weights,
)
from support.layout_models import backbone_of, config_of
from torch import Tensor

from moebench.errors import UsageError
from moebench.experts.bank_pass import BankPass, divide_by_rms
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import chain_loop
from moebench.models.plan import plan_blocks
from moebench.models.transformer import init_weights
from moebench.routing.routers.ponder_net import compute_hazards, compute_mean_steps
from moebench.routing.values import ChainRouting

both = pytest.mark.parametrize("name", ["act", "ponder_net"])


def layer_of(name: str, num_experts: int = 4, *, bias: float | None = None, **options) -> MoELayer:
    """Build a layer with drawn weights; with `bias` every step has the same logit, that bias."""
    layer = Case(name, num_experts, options).layer()
    if bias is not None:
        with torch.no_grad():
            layer.router.gate.weight_ED.zero_()
            layer.router.bias.fill_(bias)
    return layer


def states(bank: ExpertBank, x_TD: Tensor) -> list[Tensor]:
    """Return h_1 ... h_E of tokens that take all steps."""
    states = [x_TD]
    for step in range(bank.num_experts):
        read_TD = x_TD if step == 0 else divide_by_rms(states[-1])
        states.append(states[-1] + bank.expert(read_TD, step))
    return states[1:]


def test_act_by_hand() -> None:
    # p = sigmoid(1) = .731 at each step: .731 is not above .99, 1.462 is. N = 2, R = 1 - .731 = .269.
    layer, tokens = layer_of("act", bias=1.0), Tokens.draw(5)
    y_TD, record = run(layer, tokens, training=True)
    p = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(tabulate_weights(record.kept), torch.tensor([[p, 1 - p, 0, 0]]).expand(5, 4))
    h_1, h_2, *_ = states(layer.bank, tokens.x_TD)
    torch.testing.assert_close(y_TD, p * h_1 + (1 - p) * h_2 - tokens.x_TD)
    ponder = layer.router.losses(record)["ponder"]
    assert ponder.item() == pytest.approx(2 + 1 - p)
    # N counts and has no gradient: of N + R = 3 - sigmoid(b) the gradient is -p(1 - p).
    (grad,) = torch.autograd.grad(ponder, [layer.router.bias])
    assert grad.item() == pytest.approx(-p * (1 - p))


def test_ponder_net_by_hand() -> None:
    # λ = 1/3: cumulative 1/3, 5/9, ...: half of the way is behind the second step, in evaluation for every token.
    layer, tokens = layer_of("ponder_net", bias=-math.log(2)), Tokens.draw(5)
    y_TD, record = run(layer, tokens, training=False)
    assert record.routing.load_E.tolist() == [5, 5, 0, 0]
    torch.testing.assert_close(tabulate_weights(record.kept), torch.tensor([[0.0, 1, 0, 0]]).expand(5, 4))
    torch.testing.assert_close(y_TD, states(layer.bank, tokens.x_TD)[1] - tokens.x_TD)


def test_ponder_net_draws_the_step_from_p() -> None:
    # λ = 1/3 and E = 4: p = 1/3, 2/9, 4/27, 8/27. 20,000 draws: standard deviation of a share below .0036.
    record = run(layer_of("ponder_net", bias=-math.log(2)), Tokens.draw(20000), training=True)[1]
    share_E = record.kept.importance_E / 20000
    torch.testing.assert_close(share_E, torch.tensor([9.0, 6, 4, 8]) / 27, atol=0.015, rtol=0)
    reached_E = record.kept.load_E / 20000
    torch.testing.assert_close(reached_E, torch.tensor([27.0, 18, 12, 8]) / 27, atol=0.015, rtol=0)


@both
@pytest.mark.parametrize("bias", [1e4, math.inf])
@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_halts_with_certainty_takes_one_step(name: str, bias: float, training: bool) -> None:
    layer, tokens = layer_of(name, bias=bias), Tokens.draw(6)
    y_TD, record = run(layer, tokens, training=training)
    assert record.routing.load_E.tolist() == [6, 0, 0, 0]
    torch.testing.assert_close(y_TD, layer.bank.expert(tokens.x_TD, 0))  # the dense network of the first expert


@both
@pytest.mark.parametrize("training", [True, False])
def test_a_token_that_never_halts_takes_all_steps(name: str, training: bool) -> None:
    layer, tokens = layer_of(name, bias=-1e4), Tokens.draw(6)
    y_TD, record = run(layer, tokens, training=training)
    assert record.routing.load_E.tolist() == [6] * 4
    torch.testing.assert_close(tabulate_weights(record.kept), torch.tensor([[0.0, 0, 0, 1]]).expand(6, 4))
    torch.testing.assert_close(y_TD, states(layer.bank, tokens.x_TD)[-1] - tokens.x_TD)


@settings(max_examples=25)
@given(st.sampled_from(["act", "ponder_net"]), st.integers(0, 99), st.integers(2, 9), st.booleans())
def test_steps_are_the_first_ones_and_weights_sum_to_1(name: str, seed: int, num_experts: int, training: bool) -> None:
    layer = randomise_parameters(Case(name, num_experts).layer(), seed)
    _, record = run(layer, Tokens.draw(32, seed=seed), training=training)
    ran_TE = record.kept.counted_N.view(32, num_experts)
    assert ran_TE[:, 0].all()
    assert (ran_TE[:, 1:] <= ran_TE[:, :-1]).all()
    weight_TE = record.kept.weight_N.view(32, num_experts)
    torch.testing.assert_close(weight_TE.sum(1), torch.ones(32))
    assert not weight_TE[~ran_TE].any()
    if name == "act":
        halting_TE = torch.where(ran_TE[:, 1:], weight_TE[:, :-1], 0.0)  # those before the last: not yet above 1 - ε
        assert (halting_TE.sum(1) <= 0.99).all()


@given(st.integers(0, 999))
@settings(max_examples=25)
def test_a_chain_is_the_loop_in_fp64(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    bank = randomise_parameters(ExpertBank(D_MODEL, 8, 4, "swiglu"), seed).double()
    x_TD = Tokens.draw(7, seed=seed).x_TD.double().requires_grad_()
    steps_T1 = torch.randint(0, 5, (7, 1), generator=generator)
    ran_TE = torch.arange(4) < steps_T1
    weight_TE = torch.rand(7, 4, generator=generator, dtype=torch.float64).requires_grad_()
    routing = ChainRouting.from_table(weight_TE, ran_TE)
    experts = BankPass(bank, x_TD)
    read = [experts.advance(step, ran_TE[:, step]) for step in range(4)]
    assert torch.equal(read[3][ran_TE.sum(1) < 4], read[2][ran_TE.sum(1) < 4]), "who has stopped stays where it is"
    leaves = [x_TD, weight_TE, *bank.parameters()]
    assert_same_gradients(routing.compute(experts), chain_loop(bank, x_TD, routing), leaves, rtol=1e-9, atol=1e-9)


@both
def test_a_long_chain_of_gated_experts_stays_in_scale(name: str) -> None:
    # Unnormalised, sixteen gated experts of unit gain square their way to infinity.
    bank = ExpertBank(D_MODEL, 64, 16, "swiglu")
    init_weights(bank, 0)
    router = Case(name, 16).router()
    with torch.no_grad():
        router.bias.fill_(-1e4)
    layer = MoELayer(router, bank, LayerOptions(experts_per_token=16))
    y_TD, record = run(layer, Tokens.draw(64), training=True)
    assert record.kept.load_E.tolist() == [64] * 16
    assert 0.1 < y_TD.square().mean().sqrt() < 16


@both
def test_capacity_is_not_for_chains(name: str) -> None:
    layer, tokens = Case(name).layer(capacity=Capacity(train=0.25)), Tokens.draw(16)
    y_TD, record = run(layer, tokens, training=True)
    assert record.num_dropped == record.num_unserved == 0
    assert torch.equal(y_TD, run(Case(name).layer(), tokens, training=True)[0])


@both
def test_without_a_layer_a_router_sees_tokens_that_no_expert_changes(name: str) -> None:
    # p = sigmoid(-.5) = .378: the third step is the first to pass .99, the second the first to pass one half.
    router, tokens = layer_of(name, bias=-0.5).router, Tokens.draw(3)
    steps = route(router, tokens, training=False).experts_per_token_T.tolist()
    assert steps == [3 if name == "act" else 2] * 3


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


@both
def test_two_experts_are_the_fewest(name: str) -> None:
    case = Case(name, 1)
    with pytest.raises(UsageError, match=rf"^layout\.num_experts must be at least 2 with router '{name}', got 1$"):
        case.router_class.check(case.config, 1)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("act", {"epsilon": 0.0}, "epsilon"),
        ("act", {"expected_steps": 0.5}, "expected_steps"),
        ("ponder_net", {"prior": 1.0}, "prior"),
    ],
)
def test_bad_options_of_halting_are_refused(name: str, options, key: str) -> None:
    case = Case(name, 8, options)
    with pytest.raises(UsageError, match=rf"^router\.{key}"):
        case.router_class.check(case.config, 8)


@both
@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"name": "attention"}, "sends tokens through one expert after another"),
        ({"name": "whole_model"}, "sends tokens through one expert after another"),
        ({"name": "hierarchical"}, "sends tokens through one expert after another"),
        ({"name": "prototypes"}, "sends tokens through one expert after another"),
        ({"name": "every_n", "capacity_factor_train": 1.25}, r"^layout\.capacity_factor_train must be null"),
        ({"name": "every_n", "capacity_factor_eval": 2.0}, r"^layout\.capacity_factor_eval must be null"),
        ({"name": "fine_grained"}, "fixed at"),
    ],
    ids=str,
)
def test_layouts_without_chains_are_refused_in_one_line(name: str, layout, words: str) -> None:
    layout = dict(layout)
    with pytest.raises(UsageError, match=words) as caught:
        plan_blocks(config_of(layout.pop("name"), name, **layout))
    assert "\n" not in str(caught.value)


def test_cost_is_that_of_the_expected_steps() -> None:
    # One expert 2·2·8·8 FLOPs, one decision 2·8, of which there are E - 1.
    assert layer_of("act", 4, expected_steps=2.5).flops_per_token() == int(2.5 * 256) + 3 * 16
    assert layer_of("ponder_net", 3, prior=0.5).flops_per_token() == int(11 / 7 * 256) + 2 * 16
    assert layer_of("act", 2, expected_steps=9.0).router.rows_per_token(2) == 2
    model = backbone_of(config_of("every_n", {"name": "act", "expected_steps": 4.0}))
    wide = backbone_of(config_of("every_n", {"name": "act", "expected_steps": 2.0}))
    narrow, twice = (m.moe_layers()[0].bank.w_out_EFD.shape[1] for m in (model, wide))
    assert twice == pytest.approx(2 * narrow, rel=0.05)
