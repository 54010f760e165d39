"""The last bits of the token vectors decide nothing: neither between equal tokens nor between equal experts."""

from dataclasses import replace

import pytest
import torch
from support.cases import MODES, Case, Tokens, list_cases, parametrize_cases, route, run, tabulate_assignments

from moebench.experts.capacity import Capacity

SEED = 1
NOISE = 5e-8
"""How far the vectors of the same token are apart when a batch is summed in another order."""
SCALE_FREE = ("x_moe", "dynmoe", "sparse_mixer")
"""Routers that look at directions, or at shares of the highest logit: noise about 0 has them too."""
CONTINUOUS = ("remoe", "dselect_k")
"""Routers whose weights go to 0 where an expert is left out: at a weight of 1e-8 it does not matter."""


def noisy(tokens: Tokens, seed: int) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    return replace(tokens, x_TD=tokens.x_TD + NOISE * torch.randn(tokens.x_TD.shape, generator=generator))


@parametrize_cases(list_cases(), training=MODES, order=["router", "score", "priority"])
def test_noise_decides_nothing_between_equal_tokens(case: Case, training: bool, order) -> None:
    # Eight tokens, eight times each, and experts with room for half of the load: whoever is dropped has equals. With
    # this seed no score stands on the boundary of two quanta.
    tokens = Tokens.draw(8, seed=SEED).take(torch.arange(64) % 8, length=16)
    layer = case.layer(capacity=Capacity(train=0.5, eval=0.5, drop_order=order))
    kept_TE, *others = [
        tabulate_assignments(run(layer, noisy(tokens, seed), training=training)[1].kept) for seed in range(4)
    ]
    assert all(torch.equal(other_TE, kept_TE) for other_TE in others)


@pytest.mark.parametrize("training", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", [c for c in list_cases() if c.name not in SCALE_FREE + CONTINUOUS], ids=str)
def test_noise_decides_nothing_between_equal_experts(case: Case, training: bool) -> None:
    # Of a vector that is 0 but for noise all experts have the same logit but for noise.
    router, nothing = case.fresh_router(), Tokens.draw(32, length=16)
    nothing = replace(nothing, x_TD=torch.zeros_like(nothing.x_TD))
    chosen_TE, *others = [
        tabulate_assignments(route(router, noisy(nothing, seed), training=training)) for seed in range(3)
    ]
    assert all(torch.equal(other_TE, chosen_TE) for other_TE in others)
