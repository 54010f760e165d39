"""Loss-free balancing: the bias affects selection only, follows the loads of whole steps, and balances them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.context import RouteContext
from moebench.routing.group_limit import mask_to_best_groups
from moebench.routing.layer_losses import compute_raw_losses
from moebench.routing.losses import sequence_balance
from moebench.routing.metrics import max_violation
from moebench.routing.router import Router, RouterBuildContext
from moebench.routing.routers.loss_free import DeepSeekV3, LossFree
from moebench.routing.values import LayerRecord, Routing


def router_of(score_E: list[float], bias_E: list[float], router_class: type[LossFree] = LossFree, **options) -> Router:
    """Build a router with these sigmoid scores for the token [1]."""
    router = router_class(router_class.Config(**options), RouterBuildContext(d_model=1, num_experts=len(score_E)))
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.tensor(score_E).logit().unsqueeze(-1))
        router.bias_E.copy_(torch.tensor(bias_E))
    return router


def route_unit_token(router: Router) -> dict[int, float]:
    """Return the experts and weights of the token [1]."""
    ctx = RouteContext(training=True, generator=torch.Generator(), sequence_length=1)
    routing: Routing = router(torch.ones(1, 1), ctx)
    return {
        int(expert): float(weight) for expert, weight in zip(routing.expert_N, routing.weight_N.detach(), strict=True)
    }


def test_bias_affects_selection_only_by_hand() -> None:
    # Scores .8 .6 .4 .2; with the bias .8 .5 .7 .2: experts 0 and 2, with the weights .8 and .4.
    bias_E = [0.0, -0.1, 0.3, 0.0]
    weights = route_unit_token(router_of([0.8, 0.6, 0.4, 0.2], bias_E))
    assert weights == pytest.approx({0: 0.8, 2: 0.4})
    # Normalised and times 2.5: .8 / 1.2 · 2.5 = 1.667 and .4 / 1.2 · 2.5 = .833.
    weights = route_unit_token(router_of([0.8, 0.6, 0.4, 0.2], bias_E, DeepSeekV3, top_k=2))
    assert weights == pytest.approx({0: 5 / 3, 2: 5 / 6})


def test_groups_by_hand() -> None:
    # Groups of two: sums .9, 1.0, .9 + .3 biased = 1.2 and .3. The best two are groups 2 and 1; group 0 has the
    # expert with the highest score, but a low sum.
    scores = [0.85, 0.05, 0.5, 0.5, 0.6, 0.3, 0.2, 0.1]
    bias = [0.0] * 4 + [0.3] + [0.0] * 3
    router = router_of(scores, bias, top_k=3, num_groups=4, kept_groups=2)
    assert route_unit_token(router) == pytest.approx({4: 0.6, 2: 0.5, 3: 0.5})
    # By the best score of each group (DeepSeek-V2), groups 0 and 2 are kept.
    kept_TE = mask_to_best_groups(torch.tensor([scores]) + torch.tensor(bias), 4, 2, best_of=1)
    assert kept_TE.isfinite().tolist() == [[True, True, False, False, True, True, False, False]]


def test_experts_outside_the_kept_groups_are_never_selected() -> None:
    router = router_of([0.9, 0.9, 0.1, 0.1], [0.0, -5.0, -9.0, -9.0], num_groups=2, kept_groups=1)
    assert set(route_unit_token(router)) == {0, 1}  # -4.1 is below 0, so a mask of 0 would fail


@given(st.floats(-3, 3), st.integers(0, 20), st.integers(1, 3))
def test_shifting_all_biases_changes_nothing(shift: float, seed: int, top_k: int) -> None:
    router = Case("loss_free", options={"top_k": top_k}).router(seed)
    router.bias_E.copy_(torch.linspace(-0.2, 0.2, 8))
    before = route(router, Tokens.draw(16, seed=seed), training=True)
    router.bias_E += shift
    after = route(router, Tokens.draw(16, seed=seed), training=True)
    assert torch.equal(before.expert_N.view(-1, top_k).sort().values, after.expert_N.view(-1, top_k).sort().values)


@pytest.mark.parametrize(
    ("update", "load_E", "expected_E"),
    [
        ("sign", [8, 4, 3, 1], [-0.01, 0.0, 0.01, 0.01]),  # mean 4
        ("proportional", [8, 4, 3, 1], [-0.01, 0.0, 0.0025, 0.0075]),  # (4 - load) / 4 · 0.01
        ("sign", [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
        ("proportional", [0, 0, 0, 0], [0.0, 0.0, 0.0, 0.0]),
    ],
)
def test_bias_update_by_hand(update: str, load_E: list[int], expected_E: list[float]) -> None:
    router = router_of([0.5] * 4, [0.1, 0.2, 0.3, 0.4], update=update, rate=0.01)
    router.after_step(torch.tensor(load_E), {})
    assert (router.bias_E - torch.tensor([0.1, 0.2, 0.3, 0.4])).tolist() == pytest.approx(expected_E, abs=1e-7)


def measure_violations(case: Case, num_steps: int) -> Tensor:
    """Update the bias on new batches with a skewed gate; return the load violation of each."""
    layer = case.layer()
    with torch.no_grad():  # a constant feature makes all tokens prefer the first experts
        layer.router.gate.weight_ED.mul_(0.2)
        layer.router.gate.weight_ED[:, 0] = torch.linspace(1, -1, 8)
    violations = []
    for step in range(num_steps):
        tokens = Tokens.draw(256, seed=step)
        tokens.x_TD[:, 0] = 1
        _, record = run(layer, tokens, training=True)
        layer.after_step([record])
        violations.append(max_violation(record.routing.load_E))
    return torch.tensor(violations)


@pytest.mark.parametrize("update", ["sign", "proportional"])
def test_the_bias_balances_a_skewed_gate(update: str) -> None:
    # Uniform random routing of 256 tokens gives about 0.2: 64 per expert, with a standard deviation of 7.
    violations = measure_violations(Case("loss_free", options={"rate": 0.01, "update": update}), 100)
    assert violations[0] > 2
    assert violations[-30:].mean() < 0.35
    assert measure_violations(Case("loss_free", options={"rate": 0.0}), 10).min() > 2


def test_bias_has_no_gradient_and_affects_none() -> None:
    router = Case("loss_free").router()
    assert "bias_E" in router.state_dict()
    assert not dict(router.named_parameters()).keys() & {"bias_E"}
    gradients: list[Tensor] = []
    for bias in (0.0, 1.0):  # equal biases select the same experts, so gradients must be equal
        router.zero_grad()
        router.bias_E.fill_(bias)
        route(router, Tokens.draw(16), training=True).weight_N.sum().backward()
        gradients.append(router.gate.weight_ED.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("bias_E", "biased"), [([0.0, 0.0, 1.0, 1.0], 0.6), ([0.0] * 4, 1.4)])
def test_sequence_balance_ignores_the_bias(bias_E: list[float], biased: float) -> None:
    # Scores .8 .6 .4 .2 have the shares .4 .3 .2 .1; the best two are experts 0 and 1: 4 · (.5 · .4 + .5 · .3) = 1.4.
    # Counted with the bias, which selects experts 2 and 3, it would be 4 · (.5 · .2 + .5 · .1) = .6.
    router = router_of([0.8, 0.6, 0.4, 0.2], bias_E, DeepSeekV3, top_k=2)
    ctx = RouteContext(training=True, generator=torch.Generator(), sequence_length=1)
    routing = router(torch.ones(1, 1), ctx)
    record = LayerRecord(routing=routing, kept=routing, sequence_length=1)
    assert router.losses(record)["sequence_balance"].item() == pytest.approx(1.4)
    assert sequence_balance(record).item() == pytest.approx(biased)
    assert compute_raw_losses(router, record, router.config.losses)["sequence_balance"].item() == pytest.approx(1.4)


@pytest.mark.parametrize("name", ["loss_free", "deepseek_v3", "quantile_balancing"])
def test_sequence_balance_ignores_bias_groups_and_padding(name: str) -> None:
    # With 4 of 8 experts in the kept groups, the loss still counts all 8.
    options = {"num_groups": 2, "kept_groups": 1} if name != "quantile_balancing" else {}
    router = Case(name, options={"top_k": 2, **options}).router()
    state_E = router.price_E if name == "quantile_balancing" else router.bias_E
    tokens = replace(Tokens.draw(48, length=16), valid_T=torch.arange(48) % 16 < 12)
    losses = []
    for shift in (0.0, 5.0):
        state_E.copy_(torch.linspace(0, shift, 8))
        routing = route(router, tokens, training=True).keep(tokens.valid_T.repeat_interleave(2))
        record = LayerRecord(routing=routing, kept=routing, valid_T=tokens.valid_T, sequence_length=16)
        losses.append(router.losses(record)["sequence_balance"])
    share_TE = (routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True)).detach()
    expected = 0.0
    for start in (0, 16, 32):
        valid = slice(start, start + 12)
        load_E = routing.scores_TE[valid].topk(2, dim=-1).indices.flatten().bincount(minlength=8)
        expected += 8 * float((load_E / 24 * share_TE[valid].mean(0)).sum()) / 3
    assert losses[0].item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(losses[0], losses[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, r"router\.top_k=9 does not fit layout\.num_experts=8 \(allowed: 1 to 8\)"),
        ({"top_k": 1, "renormalise": True}, r"router\.top_k=1 .*; at 1 a renormalised weight"),
        ({"num_groups": 3}, r"router\.num_groups=3 does not divide layout\.num_experts=8"),
        ({"num_groups": 4}, None),  # the one kept group has two experts
        ({"top_k": 3, "num_groups": 4}, r"router\.kept_groups=1 does not fit .* \(allowed: 2 to 4\)"),
        ({"rate": -0.1}, r"router\.rate must be at least 0, got -0\.1"),
        ({"scale": 0.0}, r"router\.scale must be greater than 0, got 0\.0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str | None) -> None:
    if message is None:
        LossFree.check(LossFree.Config(**options), 8)
        return
    with pytest.raises(UsageError, match=f"^{message}"):
        LossFree.check(LossFree.Config(**options), 8)
