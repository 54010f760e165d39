"""Experts one behind another: the steps of ACT and PonderNet, against numbers by hand or a slow loop."""

import math

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
from support.halting_layers import layer_of, states
from support.layout_models import backbone_of, config_of

from moebench.errors import UsageError
from moebench.experts.bank_pass import BankPass
from moebench.experts.capacity import Capacity
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import LayerOptions, MoELayer
from moebench.experts.reference import chain_loop
from moebench.models.plan import plan_blocks
from moebench.models.transformer import init_weights
from moebench.routing.values import ChainRouting

both = pytest.mark.parametrize("name", ["act", "ponder_net"])


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
