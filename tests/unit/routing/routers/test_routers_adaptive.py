"""Routers with a variable number of experts per token, and SpeechMoE's losses: values by hand."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run, tabulate_assignments, tabulate_weights
from support.router_checks import compute_raw_losses

from moebench.routing.losses import LOSSES
from moebench.routing.values import LayerRecord, Routing


def route_with_gate(name: str, weight_ED, x_TD, num_experts: int, **options) -> Routing:
    """Route tokens with the given gate matrix."""
    router = Case(name, num_experts, options).router()
    with torch.no_grad():
        router.gate.weight_ED.zero_()
        router.gate.weight_ED[:, : weight_ED.shape[1]] = weight_ED
    tokens = Tokens.draw(len(x_TD))
    tokens = dataclasses.replace(tokens, x_TD=torch.nn.functional.pad(x_TD, (0, 8 - x_TD.shape[1])))
    return route(router, tokens, training=False)


def record_of(routing: Routing) -> LayerRecord:
    return LayerRecord(routing=routing, kept=routing)


def test_top_p_by_hand() -> None:
    # p = (.5, .3, .2): .5 reaches .4; .5 + .3 = .8 reaches .6; .85 needs all three.
    logits_TE = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, weights in ((0.4, [0.5, 0, 0]), (0.6, [0.5, 0.3, 0]), (0.85, [0.5, 0.3, 0.2])):
        routing = route_with_gate("top_p", torch.eye(3), logits_TE, 3, top_p=top_p)
        torch.testing.assert_close(tabulate_weights(routing), torch.tensor([weights]))


@settings(max_examples=25)
@given(st.sampled_from([1e-6, 0.2, 0.4, 0.7, 0.95, 1.0]), st.integers(0, 99))
def test_top_p_uses_the_smallest_set_that_reaches_p(top_p: float, seed: int) -> None:
    routing = route(Case("top_p", 8, {"top_p": top_p}).router(seed), Tokens.draw(32, seed=seed), training=False)
    used_TE, scores_TE = tabulate_assignments(routing), routing.scores_TE.detach()
    cumulative_T = (scores_TE * used_TE).sum(-1)
    assert (cumulative_T >= top_p - 1e-5).all()
    least_T = scores_TE.where(used_TE, 2.0).amin(-1)
    assert (cumulative_T - least_T < top_p).all(), "without the last expert P is not reached"
    assert (scores_TE.where(~used_TE, -1.0).amax(-1) <= least_T).all(), "the used experts must be the best"
    if top_p == 1e-6:
        assert (used_TE.sum(-1) == 1).all()


def test_balance_loss_of_top_p_is_the_papers_divided_by_the_mean_number_of_experts() -> None:
    routing = route(Case("top_p", 8, {"top_p": 0.8}).router(), Tokens.draw(64), training=True)
    mean_k = routing.experts_per_token_T.float().mean()
    assert 1.5 < mean_k < 7
    paper_loss = 8 * torch.dot(routing.load_E / 64, routing.scores_TE.mean(0))
    our_loss = LOSSES.get("load_balance").item(record_of(routing))
    torch.testing.assert_close(our_loss * mean_k, paper_loss)


def test_dynmoe_by_hand() -> None:
    # Unit vectors e0, e1 and thresholds sigmoid(0) = .5: an expert is used where the cosine is above 0. x = (1, 1)
    # uses both with weight 1/2, (1, -1) the first alone, (-1, -2) none and so its best, the first (cos -.45 > -.89).
    router = Case("dynmoe", 2).router()
    with torch.no_grad():
        router.gate.weight_ED.copy_(3 * torch.eye(2, 8))
        router.threshold_E.zero_()
        router.log_scale.fill_(math.log(2))
    x_TD = torch.nn.functional.pad(torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, -2.0]]), (0, 6))
    routing = route(router, dataclasses.replace(Tokens.draw(3), x_TD=x_TD), training=True)
    torch.testing.assert_close(tabulate_weights(routing), torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(routing.logits_TE[0], torch.full((2,), 2 / math.sqrt(2)))
    losses = router.losses(record_of(routing))
    assert losses["diversity"].item() == pytest.approx(0, abs=1e-6)  # orthogonal
    assert losses["simplicity"].item() == pytest.approx(3)
    with torch.no_grad():
        router.gate.weight_ED[1] = router.gate.weight_ED[0]
    # Equal vectors: two ones off the diagonal, so the norm is √2.
    assert router.losses(record_of(routing))["diversity"].item() == pytest.approx(math.sqrt(2))


def test_threshold_gradient_is_minus_the_score_gradient() -> None:
    router, tokens = Case("dynmoe").router(), Tokens.draw(32)
    routing = route(router, tokens, training=True)
    pull_N = torch.randn(routing.weight_N.shape, generator=torch.Generator().manual_seed(0))
    objective = (routing.weight_N * pull_N).sum()
    grad_TE, grad_E = torch.autograd.grad(objective, [routing.scores_TE, router.threshold_E])
    scale = router.log_scale.exp()
    threshold_E = (scale * router.threshold_E).sigmoid()
    slope_E = scale * threshold_E * (1 - threshold_E)
    torch.testing.assert_close(grad_E, -grad_TE.sum(0) * slope_E, rtol=1e-4, atol=1e-6)
    assert (grad_E.abs() > 1e-3).sum() >= 4


def test_temperature_of_dynmoe_does_not_change_the_selection() -> None:
    # Cosines (.6, .8), g = (.7, .7): only the second expert is above. At τ = 2 the score of the first is
    # sigmoid(1.2) = .769, above sigmoid(.7) = .668 but below sigmoid(1.4) = .802.
    router = Case("dynmoe", 2).router()
    tokens = dataclasses.replace(Tokens.draw(1), x_TD=torch.nn.functional.pad(torch.tensor([[3.0, 4.0]]), (0, 6)))
    for scale in (0.1, 1.0, 2.0, 50.0, 1e6):
        with torch.no_grad():
            router.gate.weight_ED.copy_(torch.eye(2, 8))
            router.threshold_E.fill_(0.7)
            router.log_scale.fill_(math.log(scale))
        routing = route(router, tokens, training=True)
        assert tabulate_weights(routing).tolist() == [[0.0, 1.0]]
        expected = min(scale, 100) * torch.tensor([[0.6, 0.8]])
        torch.testing.assert_close(routing.logits_TE, expected)


def test_null_experts_by_hand() -> None:
    # One real and one null choice: the real one has weight 1. Two real ones, p = .4 and .3: 4/7 and 3/7.
    # Two null ones: no expert. E = 2, m = 2, k = 2.
    p_TN = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.4, 0.3, 0.1, 0.2], [0.1, 0.1, 0.5, 0.3]])
    routing = route_with_gate("null_experts", torch.eye(4), p_TN.log(), 2, top_k=2)
    torch.testing.assert_close(tabulate_weights(routing), torch.tensor([[1.0, 0.0], [4 / 7, 3 / 7], [0.0, 0.0]]))
    # Choices: real 2 and 1 (experts 0 and 1), null 2 + 1 = 3 of 6: f = (2, 1, 1.5, 1.5) / 6, N Σ f P with
    # P = (1.0, .5, .9, .6) / 3: 4 · (2 + .5 + 1.35 + .9) / 18 = 19 / 18.
    router = Case("null_experts", 2, {"top_k": 2}).router()
    assert router.losses(record_of(routing))["balance_with_nulls"].item() == pytest.approx(19 / 18)


def test_balance_with_nulls_is_1_at_uniform_and_ignores_the_choice_of_null() -> None:
    router = Case("null_experts", 4, {"top_k": 2}).router()
    choice_TN, values = torch.full((4, 8), 1 / 8), []
    for chosen in ([[0, 4], [1, 5], [2, 6], [3, 7]], [[0, 4], [1, 4], [2, 4], [3, 4]]):
        routing = Routing.from_top_k(
            torch.tensor(chosen) % 4,
            torch.ones(4, 2),
            num_experts=4,
            token_extras={"choice_T": choice_TN, "chosen_T": torch.tensor(chosen)},
        )
        values.append(router.losses(record_of(routing))["balance_with_nulls"].item())
    assert values == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(
    ("scores", "sparsity", "importance"), [("even", math.sqrt(8), 1), ("same", 1, 8), ("each", 1, 1)]
)
def test_losses_of_speech_moe_at_their_extremes(scores: str, sparsity: float, importance: float) -> None:
    # Uniform scores: √E and 1. One expert for all: 1 and E. A different certain expert for each token: 1 and 1.
    scores_TE = {"even": torch.full((8, 8), 1 / 8), "same": torch.eye(8)[:1].expand(8, 8), "each": torch.eye(8)}[scores]
    expert_TK = scores_TE.argmax(-1, keepdim=True)
    routing = Routing.from_top_k(expert_TK, torch.ones(8, 1), num_experts=8, scores_TE=scores_TE)
    losses = Case("speech_moe").router().losses(record_of(routing))
    assert losses["sparsity"].item() == pytest.approx(sparsity)
    assert losses["mean_importance"].item() == pytest.approx(importance)


def test_speech_moe_routes_like_switch() -> None:
    tokens = Tokens.draw(32)
    layers = Case("speech_moe").layer(), Case("switch", options={"jitter": 0.0}).layer()
    (ours, record), (theirs, _) = (run(layer, tokens, training=True) for layer in layers)
    assert torch.equal(ours, theirs)
    assert set(compute_raw_losses(layers[0].router, record)) == {"sparsity", "mean_importance"}
