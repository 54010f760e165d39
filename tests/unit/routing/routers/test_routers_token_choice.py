"""Token choice: weights and defaults of each router as in its paper, by hand."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run, tabulate_weights
from support.identity_gates import build_identity_router, expert_weights, record_of, route_logits

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity
from moebench.models.transformer import init_weights
from moebench.routing.router import ROUTERS, RouterBuildContext

SIGMAS = 5
P_E = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
"""Probabilities of four experts; their logarithms are logits with this softmax."""


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("mixtral", {}, {0: 4 / 7, 1: 3 / 7}),  # softmax over the two: .4 / .7
        ("olmoe", {"top_k": 2}, {0: 0.4, 1: 0.3}),
        ("deepseek_moe", {"top_k": 2}, {0: 0.4, 1: 0.3}),
        ("deepseek_moe", {"top_k": 2, "scale": 16.0}, {0: 6.4, 1: 4.8}),
        ("deepseek_moe", {"top_k": 2, "num_groups": 2, "kept_groups": 1}, {0: 0.4, 1: 0.3}),
        ("deepseek_moe", {"top_k": 3, "num_groups": 2, "kept_groups": 2}, {0: 0.4, 1: 0.3, 2: 0.2}),
        ("frozen_top_k", {}, {0: 4 / 7, 1: 3 / 7}),
        ("glam", {}, {0: 4 / 7, 1: 3 / 7}),
        ("st_moe", {}, {0: 4 / 7, 1: 3 / 7}),
        ("gshard", {"second_expert": "none"}, {0: 4 / 7}),  # normalised before the second is dropped
        ("gshard", {"second_expert": "threshold", "threshold": 0.4}, {0: 4 / 7, 1: 3 / 7}),  # 3/7 = .43 > .4
        ("gshard", {"second_expert": "threshold", "threshold": 0.45}, {0: 4 / 7}),
        ("gshard", {"second_expert": "sampling"}, {0: 4 / 7, 1: 3 / 7}),  # sampled in training only
        ("v_moe", {}, {0: 0.4, 1: 0.3}),
        ("switch", {"exploration": "sample"}, {0: 0.4}),
    ],
)
def test_weights_by_hand(name: str, options: dict, expected: dict[int, float]) -> None:
    assert expert_weights(route_logits(build_identity_router(name, 4, **options), P_E.log())) == pytest.approx(expected)


def test_sigmoid_scores_are_independent() -> None:
    # σ(0) = 1/2 and σ(ln 3) = 3/4, for any other logits.
    router = build_identity_router("sigma_moe", 4, top_k=2)
    for other in (-1.0, -50.0):
        logits_TE = torch.tensor([[0.0, math.log(3), other, other]])
        assert expert_weights(route_logits(router, logits_TE)) == pytest.approx({0: 0.5, 1: 0.75})


def test_expert_dropout_of_sigma_moe() -> None:
    router = build_identity_router("sigma_moe", 4, top_k=4, left_out=0.25)
    weight_N = route_logits(router, torch.zeros(5000, 4), training=True).weight_N
    assert weight_N.unique().tolist() == [0.0, 0.5]
    deviation = math.sqrt(0.25 * 0.75 / weight_N.numel())
    assert (weight_N == 0).float().mean().item() == pytest.approx(0.25, abs=SIGMAS * deviation)


def test_gate_rows_of_sigma_moe_have_equal_length() -> None:
    router_class = ROUTERS.get("sigma_moe").item
    gate = router_class(router_class.Config(), RouterBuildContext(d_model=64, num_experts=8)).gate
    init_weights(gate, 0)
    length_E = gate.weight_ED.norm(dim=-1)
    torch.testing.assert_close(length_E, length_E.mean().expand(8))
    assert gate.weight_ED.std().item() == pytest.approx(0.88 / 8, rel=0.1)  # d^-1/2, truncated


@pytest.mark.parametrize(
    ("name", "options", "share_E"),
    [
        ("switch", {"exploration": "sample"}, [0.4, 0.3, 0.2, 0.1]),
        # The first is always expert 0; the second is sampled from the others: .3, .2 and .1 over .6.
        ("gshard", {"second_expert": "sampling"}, [1, 1 / 2, 1 / 3, 1 / 6]),
    ],
)
def test_sampled_loads_match_the_probabilities(name: str, options: dict, share_E: list[float]) -> None:
    num_tokens = 10_000
    routing = route_logits(build_identity_router(name, 4, **options), P_E.log().expand(num_tokens, -1), training=True)
    for load, share in zip(routing.load_E.tolist(), share_E, strict=True):
        assert abs(load - share * num_tokens) <= SIGMAS * math.sqrt(num_tokens * share * (1 - share))


def test_sampled_expert_is_weighted_by_its_probability() -> None:
    routing = route_logits(
        build_identity_router("switch", 4, exploration="sample"), P_E.log().expand(50, -1), training=True
    )
    assert routing.load_E.min() > 0
    torch.testing.assert_close(routing.weight_N, P_E[0, routing.expert_N])


def test_input_dropout_of_switch() -> None:
    # Logits of 1 become 0 with probability .3, otherwise 1 / .7: the mean is unchanged.
    router = build_identity_router("switch", 4, exploration="input_dropout", dropout=0.3)
    logits_TE = route_logits(router, torch.ones(5000, 4), training=True).logits_TE
    assert logits_TE.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert logits_TE.mean().item() == pytest.approx(1, abs=SIGMAS * math.sqrt(0.3 / 0.7 / logits_TE.numel()))
    assert route_logits(router, torch.ones(5, 4)).logits_TE.unique().tolist() == [1.0]


def find_kept_tokens(priority: str, slots_per_expert: float) -> list[list[int]]:
    """Route three tokens to expert 0 first and 1 second; return the tokens that keep a slot of each."""
    router = build_identity_router("v_moe", 3, priority=priority)
    logits_TE = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.45, 0.05], [0.8, 0.11, 0.09]]).log()
    routing = route_logits(router, logits_TE)
    layer = Case("v_moe", 3).layer(capacity=Capacity(eval=slots_per_expert * 3 / 6))
    kept = layer._apply_capacity(routing, Tokens.draw(3).context(training=False)).compact()
    return [sorted(kept.token_N[kept.expert_N == expert].tolist()) for expert in range(2)]


def test_batch_priority_by_hand() -> None:
    # The best are .6, .5, .8 and the sums .9, .95, .91; with two slots for three tokens one is dropped.
    assert find_kept_tokens("best", 2) == [[0, 2], [0, 2]]
    assert find_kept_tokens("sum", 2) == [[1, 2], [1, 2]]
    assert find_kept_tokens("position", 2) == [[0, 1], [0, 1]]
    for priority in ("best", "sum", "position"):  # no effect if all fit
        assert find_kept_tokens(priority, 3) == [[0, 1, 2], [0, 1, 2]]


def test_batch_priority_applies_in_evaluation_by_default() -> None:
    # Two tokens prefer expert 0, which has one slot: the earlier one keeps it in training, the more probable in
    # evaluation.
    logits_TE = torch.tensor([[0.6, 0.3, 0.1], [0.8, 0.15, 0.05]]).log()
    for name, options, kept in (
        ("v_moe", {}, {True: 0, False: 1}),
        ("v_moe", {"priority_train": "best"}, {True: 1, False: 1}),
        ("v_moe", {"priority": "position", "priority_train": "best"}, {True: 1, False: 0}),
        ("limoe", {}, {True: 0, False: 1}),
    ):
        for training, token in kept.items():
            routing = route_logits(build_identity_router(name, 3, noise=0.0, **options), logits_TE, training=training)
            first = routing.expert_N == 0
            assert int(routing.token_N[first][routing.priority_N[first].argmax()]) == token


def test_loss_coefficients_of_v_moe_match_its_code() -> None:
    for name in ("v_moe", "limoe"):
        losses = Case(name).config.losses
        assert (losses["score_importance"], losses["load"]) == (0.005, 0.005)


def test_first_choices_precede_all_second_choices() -> None:
    logits_TE = torch.tensor([[0.9, 0.06, 0.04], [0.34, 0.35, 0.31]]).log()
    routing = route_logits(build_identity_router("v_moe", 3), logits_TE)
    order = routing.priority_N.argsort(descending=True)
    assert list(zip(routing.token_N[order].tolist(), routing.expert_N[order].tolist(), strict=True)) == [
        (0, 0), (1, 1), (0, 1), (1, 0),
    ]  # fmt: skip


def test_losses_of_v_moe_by_hand() -> None:
    # Mean probabilities .6 and .4: variance .01 over .25 = .04. All go to expert 0 first: loads 2 and 0, CV² = 1.
    routing = route_logits(
        build_identity_router("v_moe", 2, top_k=1), torch.tensor([[0.7, 0.3], [0.5001, 0.4999]]).log()
    )
    losses = Case("v_moe", 2).router().losses(record_of(routing))
    assert losses["score_importance"].item() == pytest.approx(0.04, rel=1e-2)
    assert losses["load"].item() == pytest.approx(1.0)


@given(st.floats(0.01, 100), st.integers(0, 20))
def test_cosine_scores_ignore_vector_lengths(factor: float, seed: int) -> None:
    router, tokens = Case("x_moe").router(seed), Tokens.draw(8, seed=seed)
    before = tabulate_weights(route(router, tokens, training=False))
    tokens.x_TD.mul_(factor)
    with torch.no_grad():
        router.expert_ER.mul_(factor)
    after = route(router, tokens, training=False)
    torch.testing.assert_close(tabulate_weights(after), before, rtol=1e-3, atol=1e-4)
    assert after.logits_TE.abs().max() <= router.log_scale.exp() * (1 + 1e-5)


def test_x_moe_by_hand() -> None:
    # Token (3, 4) / 5 and experts (1, 0), (0, 1): cosines .6 and .8; at τ = .2 the logits are 3 and 4.
    router_class = ROUTERS.get("x_moe").item
    router = router_class(router_class.Config(rank=2, temperature=0.2), RouterBuildContext(d_model=2, num_experts=2))
    init_weights(router, 0)
    with torch.no_grad():
        router.projection.weight_ED.copy_(torch.eye(2))
        router.expert_ER.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
    routing = route_logits(router, torch.tensor([[3.0, 4.0]]))
    assert routing.logits_TE.tolist() == [pytest.approx([3.0, 4.0])]
    assert expert_weights(routing) == pytest.approx({1: 1 / (1 + math.exp(-1))})


def test_dropping_does_not_renormalise_weights() -> None:
    layer = Case("mixtral").layer(capacity=Capacity(train=0.5))
    _, record = run(layer, Tokens.draw(64), training=True)
    kept_N = record.kept.counted_N
    half_T = record.kept.experts_per_token_T == 1
    assert half_T.sum() > 5
    assert torch.equal(record.kept.weight_N[kept_N], record.routing.weight_N[kept_N])
    weight_T = tabulate_weights(record.kept).sum(-1)
    assert (weight_T[half_T] < 1 - 1e-3).any(), "weights must not be renormalised after a drop"


def test_loss_coefficient_of_mixtral_matches_the_released_model() -> None:
    assert Case("mixtral").config.losses == {"load_balance": 0.02 * 2}  # there the loss is k = 2 at uniform, here 1


def test_temperature_of_x_moe_is_bounded() -> None:
    router = Case("x_moe").router()
    with torch.no_grad():
        router.log_scale.fill_(20.0)
    assert route(router, Tokens.draw(64), training=False).logits_TE.abs().max() <= 100 * (1 + 1e-5)


def test_two_layer_gate_by_hand() -> None:
    # Hidden units x_0 and -x_0, of which ReLU zeroes one: the logits are |x_0| and 0. With GELU the other unit is not
    # quite 0: 2 Φ(2) - 2 Φ(-2) = 2 · .9545.
    for options, expected in (({"activation": "relu", "bias": False}, 2.0), ({}, 1.9089994)):
        router = build_two_layer_gate(**options)
        routing = route_logits(router, torch.tensor([[2.0], [-2.0]]))
        torch.testing.assert_close(routing.logits_TE, torch.tensor([[expected, 0.0]]).expand(2, -1))


def build_two_layer_gate(**options: Any) -> Any:
    """Build a gate with hidden units x_0 and -x_0, whose sum is the logit of expert 0."""
    router_class = ROUTERS.get("mlp_top_k").item
    router = router_class(
        router_class.Config(hidden_width=2, top_k=1, **options), RouterBuildContext(d_model=1, num_experts=2)
    )
    init_weights(router, 0)
    with torch.no_grad():
        router.hidden_gate.weight_ED.copy_(torch.tensor([[1.0], [-1.0]]))
        router.gate.weight_ED.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    return router


def test_hidden_bias_adds_no_flops() -> None:
    router = build_two_layer_gate(activation="relu")
    assert router.hidden_gate.bias_E.tolist() == [0.0, 0.0]
    with torch.no_grad():
        router.hidden_gate.bias_E.copy_(torch.tensor([0.5, 3.0]))
    # x_0 = 2: ReLU(2.5) + ReLU(1) = 3.5.
    assert route_logits(router, torch.tensor([[2.0]])).logits_TE.tolist() == [[3.5, 0.0]]
    assert build_two_layer_gate(bias=False).hidden_gate.bias_E is None
    assert router.flops_per_token() == 2 * 2 + 2 * 2 * 2


def test_hidden_dropout_preserves_the_mean() -> None:
    # x_0 = 2 gives one unit of 2, kept with probability 1 - .25 as 2 / .75.
    router = build_two_layer_gate(activation="relu", dropout=0.25)
    tokens_TD = torch.full((20_000, 1), 2.0)
    first_T = route_logits(router, tokens_TD, training=True).logits_TE[:, 0]
    assert sorted({round(value, 4) for value in first_T.tolist()}) == [0.0, 2.6667]
    assert (first_T > 0).float().mean().item() == pytest.approx(0.75, abs=5 * math.sqrt(0.75 * 0.25 / 20_000))
    assert (route_logits(router, tokens_TD).logits_TE[:, 0] == 2.0).all(), "not in evaluation"


def test_frozen_gate_is_not_trained_and_equals_the_initial_top_k_gate() -> None:
    router = Case("frozen_top_k").fresh_router()
    assert router.gate.weight_ED.std() > 0
    assert not router.gate.weight_ED.requires_grad
    assert router.flops_per_token() == Case("top_k").router().flops_per_token()
    trainable = Case("top_k").fresh_router()
    assert torch.equal(trainable.gate.weight_ED, router.gate.weight_ED), "equal initial weights for equal seeds"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mixtral", {"top_k": 1}, r"router\.top_k=1 does not fit"),
        ("switch", {"dropout": 1.0}, r"router\.dropout must be at least 0 and below 1, got 1\.0"),
        ("deepseek_moe", {"top_k": 9}, r"router\.top_k=9 does not fit layout\.num_experts=8"),
        ("deepseek_moe", {"num_groups": 3}, r"router\.num_groups=3 does not divide layout\.num_experts=8"),
        ("v_moe", {"noise": -1.0}, r"router\.noise must be at least 0"),
        ("x_moe", {"temperature": 0.001}, r"router\.temperature must be at least 0\.01, got 0\.001"),
        ("x_moe", {"rank": 0}, r"router\.rank must be at least 1"),
        ("sigma_moe", {"left_out": 1.0}, r"router\.left_out must be at least 0 and below 1"),
        ("mlp_top_k", {"hidden_width": 0}, r"router\.hidden_width must be at least 1"),
        ("mlp_top_k", {"dropout": 1.0}, r"router\.dropout must be at least 0 and below 1, got 1\.0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=f"^{message}"):
        build_identity_router(name, 8, **options)
