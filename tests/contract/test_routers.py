"""The contract of every registered router, with its declared facts measured."""

import dataclasses
import itertools
import re

import pytest
import torch
from support.case_selection import parametrize_cases, parametrize_sizes
from support.cases import (
    MODES,
    NUM_TOKENS,
    Case,
    Tokens,
    all_cases,
    cases_of,
    default_cases,
    route,
    run,
    tabulate_assignments,
    tabulate_weights,
)
from support.router_checks import assert_well_formed, compute_raw_losses, learns_from_own_loss, note_in_failure

from moebench.config import resolve, to_plain, to_yaml
from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.routing.losses import LOSSES

every_case = parametrize_sizes()
every_case_of_8 = parametrize_cases(cases_of(8))
every_router = pytest.mark.parametrize("case", default_cases(), ids=str)


@every_router
def test_every_router_has_cases(case: Case) -> None:
    sizes = {other.num_experts for other in all_cases() if other.name == case.name}
    assert {8, 9} <= sizes, f"{case.name} is covered for E in {sizes} only"


@every_case
def test_routing_is_well_formed(case: Case) -> None:
    for training, num_tokens in itertools.product(MODES.values(), NUM_TOKENS):
        with note_in_failure(training=training, num_tokens=num_tokens):
            routing = route(case.router(), Tokens.draw(num_tokens), training=training)
            assert routing.num_tokens == num_tokens
            assert routing.num_experts == case.num_experts
            assert_well_formed(routing)


@every_case_of_8
def test_routing_is_fp32_for_half_inputs(case: Case) -> None:
    for training, dtype in itertools.product(MODES.values(), (torch.bfloat16, torch.float16)):
        with note_in_failure(training=training, dtype=dtype):
            assert_well_formed(route(case.router(), Tokens.draw(7, dtype=dtype), training=training))


@parametrize_cases(cases_of(8), training=MODES)
def test_input_and_global_random_state_are_unchanged(case: Case, training: bool) -> None:
    layer, tokens = case.layer(), Tokens.draw(64, length=16)
    before, state = tokens.x_TD.clone(), torch.get_rng_state()
    run(layer, tokens, training=training)
    assert torch.equal(tokens.x_TD, before)
    assert torch.equal(torch.get_rng_state(), state)


@every_case_of_8
def test_randomness_comes_from_the_context_generator_only(case: Case) -> None:
    router, tokens = case.router(), Tokens.draw(64)
    first = route(router, tokens, training=True, seed=3)
    torch.manual_seed(999)
    second = route(router, tokens, training=True, seed=3)
    assert torch.equal(tabulate_assignments(first), tabulate_assignments(second))
    assert torch.equal(tabulate_weights(first), tabulate_weights(second))


@every_case_of_8
def test_evaluation_is_deterministic_and_stateless(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(64, length=16)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    first, _ = run(layer, tokens, training=False)
    second, _ = run(layer, tokens, training=False)
    assert torch.equal(first, second)
    after = layer.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@every_case_of_8
def test_task_loss_reaches_the_router_if_it_learns(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(64, length=16)
    y_TD, _ = run(layer, tokens, training=True)
    (y_TD * torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.router.named_parameters()}
    assert gradients or not case.facts.learned
    for name, gradient in gradients.items():
        if case.facts.learned and not learns_from_own_loss(case, name):
            assert gradient is not None, name
            assert gradient.norm() > 1e-4, name
        else:
            assert gradient is None or not gradient.any(), name


@every_case_of_8
def test_experts_without_tokens_get_zero_gradient(case: Case) -> None:
    layer, tokens = case.layer(), Tokens.draw(1)
    y_TD, record = run(layer, tokens, training=True)
    y_TD.square().sum().backward()
    idle_E = record.kept.load_E == 0
    for parameter in layer.bank.parameters():
        assert parameter.grad is not None
        per_expert_E = parameter.grad.flatten(1).abs().sum(1)
        assert (per_expert_E[idle_E] == 0).all()
        assert (per_expert_E[~idle_E] > 0).all()


@every_case
def test_configuration_round_trip(case: Case) -> None:
    plain = to_plain(case.config)
    given = {"router": plain, "layout": {"num_experts": case.num_experts}}
    config = resolve(given)
    assert config.router == case.config
    assert to_plain(config)["router"] == plain
    assert re.search(rf"^  name: {case.name}$", to_yaml(config), re.MULTILINE)


@every_router
def test_facts_are_complete(case: Case) -> None:
    facts = case.facts
    for key in ("family", "equation", "paper"):
        assert getattr(facts, key).strip(), key
    assert facts.causality.reason.strip()
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi:10\.", facts.paper), facts.paper
    assert case.router_class.__doc__
    assert case.config.name == case.name
    assert dataclasses.is_dataclass(case.config)
    with pytest.raises(dataclasses.FrozenInstanceError):
        case.config.name = "other"


@every_case
def test_declared_losses_exist_and_are_finite(case: Case) -> None:
    for training, num_tokens in itertools.product(MODES.values(), NUM_TOKENS):
        with note_in_failure(training=training, num_tokens=num_tokens):
            layer = case.layer()
            _, record = run(layer, Tokens.draw(num_tokens), training=training)
            assert set(layer.router.losses(record)) == set(case.facts.own_losses)
            losses = compute_raw_losses(layer.router, record)
            assert set(losses) == {*case.config.losses, *case.facts.own_losses}
            for name, loss in losses.items():
                assert loss.shape == (), name
                assert torch.isfinite(loss), name
                assert loss >= 0, name


@every_router
def test_default_losses_have_gradients(case: Case) -> None:
    has_gradient = {}
    for size in (case.num_experts, case.num_experts + 1):  # some losses are 0 if E is a power of two
        layer = dataclasses.replace(case, num_experts=size).layer()
        _, record = run(layer, Tokens.draw(64), training=True)
        for name, loss in compute_raw_losses(layer.router, record).items():
            gradients = torch.autograd.grad(loss, list(layer.router.parameters()), allow_unused=True, retain_graph=True)
            is_nonzero = any(gradient is not None and gradient.norm() > 1e-6 for gradient in gradients)
            has_gradient[name] = has_gradient.get(name, False) or is_nonzero
    assert all(has_gradient.values()), has_gradient


@every_case_of_8
def test_extreme_logits_stay_finite(case: Case) -> None:
    for training, scale in itertools.product(MODES.values(), (0.0, 1e-30, 1e4, 1e6)):
        with note_in_failure(training=training, scale=scale):
            layer = case.layer()
            with torch.no_grad():
                for parameter in layer.router.parameters():
                    parameter *= scale
            assert_finite_with_gradients(layer, training=training)


def assert_finite_with_gradients(layer: MoELayer, *, training: bool) -> None:
    y_TD, record = run(layer, Tokens.draw(64), training=training)
    assert_well_formed(record.routing)
    total = y_TD.square().mean() + sum(compute_raw_losses(layer.router, record).values())
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@parametrize_cases(cases_of(8), training=MODES)
def test_equal_tokens_are_routed(case: Case, training: bool) -> None:
    tokens = Tokens.draw(64)
    same = dataclasses.replace(
        tokens, x_TD=tokens.x_TD[:1].expand(64, -1).clone(), token_id_T=tokens.token_id_T[:1].expand(64).clone()
    )
    assert_well_formed(route(case.router(), same, training=training))


def test_noise_spreads_the_first_step_of_noisy_top_k() -> None:
    # Both projections start at 0: without noise all 512 tokens would tie and use the same two experts.
    router = Case("noisy_top_k").fresh_router()
    load_E = route(router, Tokens.draw(512), training=True).load_E
    assert load_E.min() > 64  # 512 · 2 / 8 = 128 expected, standard deviation below 10


@parametrize_cases(cases_of(8), training=MODES)
def test_padding_changes_nothing(case: Case, training: bool) -> None:
    layer = case.layer()
    tokens = Tokens.draw(16)
    padded = Tokens.draw(24)
    padded = dataclasses.replace(
        padded,
        x_TD=torch.cat([tokens.x_TD, 30 * padded.x_TD[16:]]),
        token_id_T=torch.cat([tokens.token_id_T, padded.token_id_T[16:]]),
        valid_T=torch.arange(24) < 16,
    )
    y_TD, record = run(layer, tokens, training=training)
    padded_TD, padded_record = run(layer, padded, training=training)
    torch.testing.assert_close(padded_TD[:16], y_TD)
    assert not padded_TD[16:].any()
    assert torch.equal(padded_record.routing.load_E, record.routing.load_E)
    torch.testing.assert_close(tabulate_weights(padded_record.kept)[:16], tabulate_weights(record.kept))
    torch.testing.assert_close(
        compute_raw_losses(layer.router, padded_record), compute_raw_losses(layer.router, record)
    )


@every_case_of_8
def test_batch_of_padding_only(case: Case) -> None:
    layer = case.layer()
    tokens = dataclasses.replace(Tokens.draw(8), valid_T=torch.zeros(8, dtype=torch.bool))
    y_TD, record = run(layer, tokens, training=True)
    assert not y_TD.any()
    assert record.routing.load_E.sum() == 0
    assert all(torch.isfinite(loss) for loss in compute_raw_losses(layer.router, record).values())


@every_router
def test_state_dict_restores_the_routing(case: Case) -> None:
    tokens = Tokens.draw(64)
    first, second = case.router(seed=0), case.router(seed=1)
    second.load_state_dict(first.state_dict())
    ours, theirs = (route(router, tokens, training=False) for router in (first, second))
    assert torch.equal(tabulate_weights(ours), tabulate_weights(theirs))


def test_facts_of_losses_are_complete() -> None:
    for entry in LOSSES.entries():
        for key in ("equation", "paper", "uniform", "collapsed"):
            assert getattr(entry.facts, key).strip(), (entry.name, key)
        assert entry.doc


@parametrize_cases(default_cases(), training=MODES)
def test_scores_exist_if_declared(case: Case, training: bool) -> None:
    routing = route(case.router(), Tokens.draw(8), training=training)
    assert (routing.scores_TE is not None) is case.facts.makes_scores


@every_router
def test_losses_refuse_routers_without_the_needed_table(case: Case) -> None:
    _, record = run(case.layer(), Tokens.draw(8), training=True)
    needed = dict.fromkeys(("load_balance", "sequence_balance", "parameter_penalty"), record.routing.scores_TE)
    needed |= dict.fromkeys(("z", "global_entropy", "local_entropy", "mutual_information"), record.routing.logits_TE)
    for entry in LOSSES.entries():
        if needed.get(entry.name, record) is None:
            with pytest.raises(UsageError, match=rf"^router\.losses\.{entry.name}: this router has no "):
                entry.item(record)
        else:
            assert torch.isfinite(entry.item(record)), entry.name
