"""Autonomy of Experts: scores are norms of the experts' projections."""

import math

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, route, tabulate_weights

from moebench.errors import UsageError


def test_scores_are_norms_of_projections_by_hand() -> None:
    # Expert 0 reads the first two numbers of x, expert 1 twice the third, expert 2 none. x = (3, 4, 1): 5, 2, 0.
    router = Case("autonomy_of_experts", 3, {"rank": 2}).router()
    with torch.no_grad():
        router.down_EDR.zero_()
        router.down_EDR[0, 0, 0] = router.down_EDR[0, 1, 1] = 1
        router.down_EDR[1, 2, 0] = 2
    tokens = Tokens.draw(1)
    tokens.x_TD.copy_(torch.tensor([[3.0, 4, 1, *[9.0] * (D_MODEL - 3)]]))
    routing = route(router, tokens, training=False)
    assert routing.logits_TE.tolist() == [[5, 2, 0]]
    best = 1 / (1 + math.exp(-3))  # e^5 against e^2, renormalised over the two
    assert tabulate_weights(routing)[0].tolist() == pytest.approx([best, 1 - best, 0])


def test_longer_projections_attract_tokens() -> None:
    router, tokens = Case("autonomy_of_experts").router(), Tokens.draw(64)
    before = route(router, tokens, training=False)
    with torch.no_grad():
        router.down_EDR[5] *= 10
    after = route(router, tokens, training=False)
    torch.testing.assert_close(after.logits_TE[:, 5], 10 * before.logits_TE[:, 5])
    assert after.load_E[5] == 64 > before.load_E[5]


def test_scores_ignore_the_sign_of_the_token() -> None:
    router, tokens = Case("autonomy_of_experts").router(), Tokens.draw(16)
    before = route(router, tokens, training=False)
    tokens.x_TD.neg_()
    assert torch.equal(tabulate_weights(route(router, tokens, training=False)), tabulate_weights(before))


def test_every_expert_projects_every_token() -> None:
    assert Case("autonomy_of_experts", 8, {"rank": 3}).router().flops_per_token() == 2 * 8 * D_MODEL * 3


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_k": 9}, {"rank": 0}])
def test_bad_options_of_autonomy_are_refused(options) -> None:
    case = Case("autonomy_of_experts", 8, options)
    with pytest.raises(UsageError, match=rf"router\.{next(iter(options))}"):
        case.router_class.check(case.config, 8)
