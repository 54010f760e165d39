"""What routers say of themselves for the reader: measured where it can be, complete, and the same in the docs."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, default_cases, route

from moebench.catalogue.pages import render_routers_page

every_router = pytest.mark.parametrize("case", default_cases(), ids=str)
PAGE = Path(__file__).parents[2] / "docs" / "routers.md"


def alike(seed: int) -> Tokens:
    """Return 64 tokens in 4 sequences that have much in common: most routers then overload some experts."""
    tokens = Tokens.draw(64, seed=seed, length=16)
    common_D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return replace(tokens, x_TD=tokens.x_TD + 2 * common_D)


@every_router
def test_loads_are_even_if_the_router_says_so(case: Case) -> None:
    loads = [route(case.router(seed), alike(seed), training=True, seed=seed).load_E for seed in range(8)]
    even = [bool(load_E.max() - load_E.min() <= 1) for load_E in loads]
    assert all(even) is case.facts.balanced, [load_E.tolist() for load_E in loads]


@every_router
def test_each_token_has_as_many_experts_as_declared_or_the_router_says_that_it_varies(case: Case) -> None:
    """Arms are matched and widths solved by `experts_per_token`, unless `Facts.variable_k` says that it is a mean."""
    varies = False
    for seed, training in itertools.product(range(8), (True, False)):
        count_T = route(case.router(seed), alike(seed), training=training, seed=seed).experts_per_token_T
        declared = case.num_experts if case.is_soft else case.experts_per_token
        varies |= bool((count_T != declared).any())
    assert varies is case.facts.variable_k


@every_router
def test_a_router_says_when_to_use_it_and_what_can_go_wrong(case: Case) -> None:
    for key in ("use", "beware"):
        text = getattr(case.facts, key)
        assert text, f"Facts.{key} of {case.name} is empty"
        assert text[0].isupper(), text
        assert text.endswith("."), text


def test_the_page_is_what_the_routers_say(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--plugin"):
        pytest.skip("a plugin's routers are not on the page")
    assert PAGE.read_text() == render_routers_page(), "docs/routers.md is old: make docs"
