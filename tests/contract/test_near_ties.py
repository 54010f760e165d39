"""Rounding noise in the token vectors does not change the routing between equal tokens or equal experts."""

from dataclasses import replace

import pytest
import torch
from support.case_selection import parametrize_cases
from support.cases import MODES, Case, Tokens, list_cases, route, run, tabulate_assignments

from moebench.experts.capacity import Capacity

SEED = 1
NOISE = 5e-8
"""Noise of a token vector when a batch is summed in another order."""
SCALE_FREE = ("x_moe", "dynmoe", "sparse_mixer")
"""Routers that use directions, or logits relative to the highest: noise around 0 changes these."""
CONTINUOUS = ("remoe", "dselect_k")
"""Routers whose weights vanish where an expert is dropped: a weight of 1e-8 does not matter."""


def noisy(tokens: Tokens, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return replace(tokens, x_TD=tokens.x_TD + NOISE * torch.randn(tokens.x_TD.shape, generator=generator))


@parametrize_cases(list_cases(), training=MODES, order=["router", "score", "priority"])
def test_noise_does_not_decide_between_equal_tokens(case: Case, training: bool, order) -> None:
    # Eight tokens, eight times each, and experts with slots for half of the load, so that equal tokens compete. With
    # this seed no score is on the boundary of two quanta.
    tokens = Tokens.draw(8, seed=SEED).take(torch.arange(64) % 8, length=16)
    layer = case.layer(capacity=Capacity(train=0.5, eval=0.5, drop_order=order))
    kept_TE, *others = [
        tabulate_assignments(run(layer, noisy(tokens, seed), training=training)[1].kept) for seed in range(4)
    ]
    assert all(torch.equal(other_TE, kept_TE) for other_TE in others)


@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", [c for c in list_cases() if c.name not in SCALE_FREE + CONTINUOUS], ids=str)
def test_noise_does_not_decide_between_equal_experts(case: Case, training: bool) -> None:
    # For a zero vector all logits are equal up to noise.
    router, nothing = case.fresh_router(), Tokens.draw(32, length=16)
    nothing = replace(nothing, x_TD=torch.zeros_like(nothing.x_TD))
    chosen_TE, *others = [
        tabulate_assignments(route(router, noisy(nothing, seed), training=training)) for seed in range(3)
    ]
    assert all(torch.equal(other_TE, chosen_TE) for other_TE in others)
