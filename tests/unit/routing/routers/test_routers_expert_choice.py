"""Routers in which experts choose tokens: caps, groups, shortlists, thresholds."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cases import Case, Tokens, route, run, tabulate_assignments, tabulate_weights

from moebench.errors import UsageError
from moebench.models.transformer import init_weights
from moebench.routing.assignment import solve_capped_plan
from moebench.routing.router import ROUTERS, RouterBuildContext
from moebench.routing.values import LayerRecord


def identity_router(name: str, num_experts: int, **options):
    """Build a router whose logits are the first elements of the token."""
    router = Case(name, num_experts, options).router()
    with torch.no_grad():
        router.gate.weight_ED.copy_(torch.eye(num_experts, 8))
    return router


def tokens_with(logits: list[list[float]], length: int | None = None) -> Tokens:
    logits_TE = torch.tensor(logits)
    tokens = Tokens.draw(len(logits), length=length)
    return dataclasses.replace(tokens, x_TD=torch.nn.functional.pad(logits_TE, (0, 8 - logits_TE.shape[1])))


def test_two_sided_by_hand() -> None:
    # E = 2, c = 1, T = 4: each expert has 2 slots. Shortlists of 1: tokens 0, 1, 2 shortlist expert 0 and token 3
    # expert 1. Expert 0 takes its best two, 0 and 1; expert 1 takes token 3; token 2 gets no expert.
    tokens = tokens_with([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    routing = route(identity_router("two_sided", 2, shortlist=1, average_experts=1), tokens, training=False)
    assert tabulate_assignments(routing).tolist() == [[True, False], [True, False], [False, False], [False, True]]
    assert routing.load_E.tolist() == [2, 1]
    p = torch.tensor([3.0, 2.0, 1.0]).sigmoid()
    torch.testing.assert_close(tabulate_weights(routing)[[0, 1, 3], [0, 0, 1]], p[[0, 1, 2]])


@settings(max_examples=20)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 99))
def test_two_sided_respects_both_limits_and_preferences(num_tokens: int, shortlist: int, seed: int) -> None:
    average = min(shortlist, 2)
    case = Case("two_sided", 8, {"shortlist": shortlist, "average_experts": average})
    routing = route(case.router(seed), Tokens.draw(num_tokens, seed=seed), training=False)
    taken_TE, capacity = tabulate_assignments(routing), min(num_tokens, max(1, num_tokens * average // 8))
    assert taken_TE.sum(0).max() <= capacity
    assert taken_TE.sum(1).max() <= shortlist
    scores_TE = routing.scores_TE
    shortlisted_TE = torch.zeros_like(taken_TE).scatter(1, scores_TE.topk(shortlist, -1).indices, True)
    for expert in range(8):  # tokens turned away have lower scores than those taken
        rejected_T = shortlisted_TE[:, expert] & ~taken_TE[:, expert]
        if rejected_T.any():
            assert taken_TE[:, expert].sum() == capacity
            assert scores_TE[rejected_T, expert].max() <= scores_TE[taken_TE[:, expert], expert].min()


@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_two_sided_with_full_shortlist_is_expert_choice(group: str) -> None:
    tokens = Tokens.draw(48, length=16)
    both = (Case("two_sided", 8, {"shortlist": 8, "group": group}), Case("expert_choice", 8, {"group": group}))
    ours, theirs = (tabulate_weights(route(case.router(), tokens, training=True)) for case in both)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_capped_plan_by_hand() -> None:
    # Two tokens, two experts with one slot each, cap 1. Both experts prefer token 0 (.9 > .6, .8 > .1). Giving it to
    # expert 1 and token 1 to expert 0 is worth .6 + .8 = 1.4; the other way .9 + .1 = 1.0.
    score_GTE = torch.tensor([[[0.9, 0.8], [0.6, 0.1]]])
    plan_GTE = solve_capped_plan(score_GTE, torch.tensor([1]), 1, None).exp().clamp(max=1)
    torch.testing.assert_close(plan_GTE[0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), atol=0.03, rtol=0)


@pytest.mark.parametrize("cap", [2, 3])
@pytest.mark.parametrize("group", ["batch", "sequence"])
def test_cap_is_exact_and_experts_are_nearly_full(cap: int, group: str) -> None:
    tokens = Tokens.draw(128, length=32)
    free = route(Case("expert_choice", 8, {"group": group}).router(), tokens, training=True)
    capped = route(Case("expert_choice", 8, {"group": group, "max_per_token": cap}).router(), tokens, training=True)
    assert tabulate_assignments(free).sum(1).max() > cap
    assert tabulate_assignments(capped).sum(1).max() <= cap
    assert capped.load_E.max() <= 32
    assert capped.load_E.sum() >= 0.9 * 256
    # Fewer tokens are unserved: slots freed by the cap go to other tokens.
    assert (tabulate_assignments(capped).sum(1) == 0).sum() <= (tabulate_assignments(free).sum(1) == 0).sum()
    weight_N = capped.scores_TE[capped.token_N, capped.expert_N].where(capped.counted_N, 0.0)
    torch.testing.assert_close(capped.weight_N, weight_N)


def test_cap_of_all_experts_changes_little() -> None:
    tokens = Tokens.draw(64)
    ours, theirs = (
        route(Case("expert_choice", 8, options).router(), tokens, training=True)
        for options in ({"max_per_token": 8}, {})
    )
    assert (
        tabulate_assignments(ours) == tabulate_assignments(theirs)
    ).float().mean() > 0.97  # the paper's plan is at most entropic


def test_expert_choice_by_position_by_hand() -> None:
    # Four sequences of 8 tokens, c = 2, E = 8: every expert takes 4 · 2 / 8 = 1 token of each position.
    router, tokens = Case("expert_choice_by_position").router(), Tokens.draw(32, length=8)
    routing = route(router, tokens, training=True)
    taken_BLE = tabulate_assignments(routing).view(4, 8, 8)
    assert (taken_BLE.sum(0) == 1).all()
    best_LE = routing.scores_TE.view(4, 8, 8).argmax(0)
    assert torch.equal(taken_BLE.int().argmax(0), best_LE)


def test_thresholds_at_the_quantile_match_expert_choice() -> None:
    # 64 tokens, k = 2 of 8: with each threshold between the 16th and 17th best logit, both take the same tokens.
    router, tokens = Case("expert_threshold").router(), Tokens.draw(64)
    logits_TE = route(router, tokens, training=False).logits_TE
    sorted_TE = logits_TE.detach().sort(0, descending=True).values
    router.threshold_E.copy_((sorted_TE[15] + sorted_TE[16]) / 2)
    routing = route(router, tokens, training=False)
    best_CE = logits_TE.topk(16, dim=0).indices
    expected_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(0, best_CE, True)
    assert torch.equal(tabulate_assignments(routing), expected_TE)
    torch.testing.assert_close(tabulate_weights(routing), logits_TE.sigmoid() * expected_TE)


def test_thresholds_converge_to_their_share_on_new_tokens() -> None:
    layer = Case("expert_threshold", options={"decay": 0.5}).layer()
    for step in range(12):
        _, record = run(layer, Tokens.draw(512, seed=step), training=True)
        layer.after_step([record])
    load_E = route(layer.router, Tokens.draw(2048, seed=99), training=False).load_E
    # 2048 · 2 / 8 = 512 each, standard deviation 20 plus that of the quantiles.
    assert (load_E - 512).abs().max() < 120


@pytest.mark.parametrize(("num_experts", "average"), [(16, 2), (64, 2), (8, 1)])
def test_initial_thresholds_match_the_initial_gate(num_experts: int, average: int) -> None:
    # Ignoring the truncation, logits would be wider by 1/.8796: 1.51, 1.13 and .77 experts per token.
    router_class = ROUTERS.get("expert_threshold").item
    router = router_class(
        router_class.Config(average_experts=average), RouterBuildContext(d_model=512, num_experts=num_experts)
    )
    init_weights(router, 0)
    x_TD = torch.nn.functional.rms_norm(torch.randn(8192, 512, generator=torch.Generator().manual_seed(0)), (512,))
    routing = route(
        router, Tokens(x_TD=x_TD, token_id_T=torch.zeros(8192, dtype=torch.int64), length=64), training=True
    )
    assert int(routing.load_E.sum()) / 8192 == pytest.approx(average, rel=0.05)


def test_thresholds_do_not_depend_on_micro_batches_or_padding() -> None:
    tokens = Tokens.draw(64, length=16)
    layers = [Case("expert_threshold").layer() for _ in range(3)]
    _, full_record = run(layers[0], tokens, training=True)
    layers[0].after_step([full_record])
    parts = [run(layers[1], tokens.take(torch.arange(n, n + 32)), training=True)[1] for n in (0, 32)]
    layers[1].after_step(parts)
    longer = Tokens.draw(80, length=16)
    longer = dataclasses.replace(
        longer, x_TD=torch.cat([tokens.x_TD, 9 * longer.x_TD[64:]]), valid_T=torch.arange(80) < 64
    )
    layers[2].after_step([run(layers[2], longer, training=True)[1]])
    for layer in layers[1:]:
        torch.testing.assert_close(layer.router.threshold_E, layers[0].router.threshold_E)
    assert not torch.equal(layers[0].router.threshold_E, Case("expert_threshold").router().threshold_E)


@pytest.mark.parametrize(("mean", "deviation"), [(0.0, 1.0), (-7.0, 0.1), (30.0, 0.3)])
def test_thresholds_converge_for_any_location_of_logits(mean: float, deviation: float) -> None:
    # With equal bins of r / (1 + |r|) all logits near 30 would fall into one.
    generator = torch.Generator().manual_seed(0)
    router = identity_router("expert_threshold", 8, decay=0.5)
    for _ in range(40):
        x_TD = mean + deviation * torch.randn(2048, 8, generator=generator)
        routing = route(router, tokens_with(x_TD.tolist()), training=True)
        router.after_step(routing.load_E, router.statistics(LayerRecord(routing=routing, kept=routing)))
    # 2048 / 4 each, with a standard deviation of 20 for the step and 20 for the quantiles.
    assert (routing.load_E - 512).abs().max() < 120
    assert routing.load_E.float().mean().item() == pytest.approx(512, rel=0.03)


def test_threshold_update_by_hand() -> None:
    # 4 tokens, k = 1 of 2 experts: two of four pass above the third largest logit, .3 and .1.
    router = identity_router("expert_threshold", 2, average_experts=1, decay=0.75)
    router.threshold_E.copy_(torch.tensor([0.5, -0.4]))
    routing = route(router, tokens_with([[0.9, 0.0], [0.7, 0.2], [0.3, 0.1], [0.2, 0.6]]), training=True)
    router.after_step(routing.load_E, router.statistics(LayerRecord(routing=routing, kept=routing)))
    # .75 · .5 + .25 · .3 = .45 and .75 · -.4 + .25 · .1 = -.275, within 1/128 of the step.
    assert router.threshold_E.tolist() == pytest.approx([0.45, -0.275], abs=0.25 * 0.5 / 128)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("expert_choice", {"max_per_token": 1}, "router.max_per_token must be null or at least average_experts=2"),
        ("two_sided", {"shortlist": 1}, "router.shortlist must be null or at least average_experts=2, got 1"),
        ("expert_threshold", {"decay": 1.0}, "router.decay must be at least 0 and below 1, got 1.0"),
    ],
)
def test_options_out_of_range_are_refused(name: str, options: dict, message: str) -> None:
    case = Case(name, options=options)
    with pytest.raises(UsageError) as caught:
        case.router_class.check(case.config, 8)
    assert str(caught.value).startswith(message)
