"""Quantile balancing: prices by hand, against sorted quantiles, and from parts of a step."""

from dataclasses import replace

import pytest
import torch
from support.cases import Case, Tokens, run
from support.identity_gates import build_identity_router, expert_weights, record_of, route_logits
from torch import Tensor

from moebench.routing.metrics import max_violation


def test_prices_by_hand() -> None:
    # Scores of 4 tokens for 2 experts, k = 1, prices 0: all prefer expert 0, and expert 1 is next best. Worth of
    # expert 0: .5, .4, .3, .2; of expert 1: always 0. With Tk/E = 2 tokens each, the third worth is the price: .3 and
    # 0, minus their mean .15 and -.15. Tokens 0 and 1 stay, 3 moves, 2 is on the boundary. A bin is off by at most
    # .3 / 128.
    router = build_identity_router("quantile_balancing", 2, top_k=1)
    scores_TE = torch.tensor([[0.7, 0.2], [0.6, 0.2], [0.5, 0.2], [0.4, 0.2]])
    routing = route_logits(router, scores_TE.logit())
    assert routing.load_E.tolist() == [4, 0]
    router.after_step(routing.load_E, router.statistics(record_of(routing)))
    assert router.price_E.tolist() == pytest.approx([0.15, -0.15], abs=0.3 / 128)
    again = route_logits(router, scores_TE.logit())
    assert [list(expert_weights(again, token)) for token in (0, 1, 3)] == [[0], [0], [1]]
    assert again.weight_N[[0, 1, 3]].tolist() == pytest.approx([0.7, 0.6, 0.2]), "the price does not enter the weights"


def exact_prices(scores_TE: Tensor, price_E: Tensor, top_k: int) -> Tensor:
    """Return the next prices, from sorted worths."""
    next_best_T1 = (scores_TE - price_E).topk(top_k + 1, dim=-1).values[:, top_k:]
    worth_TE = (scores_TE - next_best_T1).sort(0, descending=True).values
    quantile_E = worth_TE[len(scores_TE) * top_k // scores_TE.shape[1]]
    return quantile_E - quantile_E.mean()


def test_update_matches_exact_quantiles_within_a_bin() -> None:
    router = build_identity_router("quantile_balancing", 8)
    for seed in range(5):
        logits_TE = 2 * torch.randn(320, 8, generator=torch.Generator().manual_seed(seed))
        before_E, routing = router.price_E.clone(), route_logits(router, logits_TE)
        router.after_step(routing.load_E, router.statistics(record_of(routing)))
        expected_E = exact_prices(logits_TE.sigmoid(), before_E, 2)
        largest = (expected_E - before_E).abs().max().item()
        torch.testing.assert_close(router.price_E, expected_E, rtol=0, atol=2 * largest / 128 + 1e-6)


def test_saturated_sigmoids_are_balanced_like_exact_quantiles() -> None:
    # Most scores are within 1e-4 of 1. With 2000 bins of equal width some experts get no token, others 170 of 960.
    generator = torch.Generator().manual_seed(4)
    logits_TE = 0.3 * torch.randn(960, 16, generator=generator)
    logits_TE = 6 * (logits_TE + torch.randn(16, generator=generator))
    router = build_identity_router("quantile_balancing", 16, top_k=1)
    price_E = torch.zeros(16)
    for _ in range(30):
        routing = route_logits(router, logits_TE)
        router.after_step(routing.load_E, router.statistics(record_of(routing)))
        price_E = exact_prices(logits_TE.sigmoid(), price_E, 1)
    load_E = route_logits(router, logits_TE).load_E
    exact_E = (logits_TE.sigmoid() - price_E).argmax(-1).bincount(minlength=16)
    assert exact_E[:8].tolist() == [53, 90, 51, 60, 85, 51, 70, 71]
    assert (load_E - exact_E).abs().max() <= 10
    assert max_violation(load_E) <= max_violation(exact_E)


def test_repeating_one_batch_balances_it() -> None:
    layer = Case("quantile_balancing").layer()
    with torch.no_grad():
        layer.router.gate.weight_ED.mul_(0.3)
        layer.router.gate.weight_ED[:, 0] = torch.linspace(1, -1, 8)
    tokens, violations = Tokens.draw(512), []
    tokens.x_TD[:, 0] = 1
    for _ in range(12):
        _, record = run(layer, tokens, training=True)
        violations.append(max_violation(record.routing.load_E))
        layer.after_step([record])
        assert layer.router.price_E.mean().item() == pytest.approx(0, abs=1e-6)
    assert violations[0] > 1.5
    assert violations[1] < 0.7 * violations[0], "one step must help much more than one of loss_free"
    assert violations[-1] < 0.15


def test_prices_do_not_depend_on_micro_batches_or_padding() -> None:
    tokens, prices = Tokens.draw(64), []
    halves = [tokens.take(torch.arange(32)), tokens.take(torch.arange(32, 64))]
    padded = [tokens.take(torch.arange(64)), Tokens.draw(64, seed=9)]
    masks = [None, torch.zeros(64, dtype=torch.bool)]
    for parts, valid in (([tokens], [None]), (halves, [None, None]), (padded, masks)):
        layer = Case("quantile_balancing").layer()
        records = []
        for part, valid_T in zip(parts, valid, strict=True):
            records.append(run(layer, replace(part, length=32, valid_T=valid_T), training=True)[1])
        layer.after_step(records)
        prices.append(layer.router.price_E)
    assert torch.equal(prices[0], prices[1])
    assert torch.equal(prices[0], prices[2])
