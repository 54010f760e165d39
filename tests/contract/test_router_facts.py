"""Facts of routers: measured where possible, complete, and equal to the pages in docs/."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.cases import D_MODEL, Case, Tokens, default_cases, route

from moebench.catalogue.pages import INDEX_FILE, render_router_pages

every_router = pytest.mark.parametrize("case", default_cases(), ids=str)
DOCS = Path(__file__).parents[2] / "docs"


def draw_similar_tokens(seed: int) -> Tokens:
    """Draw 64 similar tokens in 4 sequences, with which most routers overload some experts."""
    tokens = Tokens.draw(64, seed=seed, length=16)
    common_D = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(seed))
    return replace(tokens, x_TD=tokens.x_TD + 2 * common_D)


@every_router
def test_loads_are_even_if_declared(case: Case) -> None:
    loads = [route(case.router(seed), draw_similar_tokens(seed), training=True, seed=seed).load_E for seed in range(8)]
    even = [bool(load_E.max() - load_E.min() <= 1) for load_E in loads]
    assert all(even) is case.facts.balanced, [load_E.tolist() for load_E in loads]


@every_router
def test_experts_per_token_are_as_declared(case: Case) -> None:
    """`experts_per_token` must be exact unless `Facts.variable_k` declares it a mean: arms are matched by it."""
    varies = False
    for seed, training in itertools.product(range(8), (True, False)):
        count_T = route(case.router(seed), draw_similar_tokens(seed), training=training, seed=seed).experts_per_token_T
        declared = case.num_experts if case.is_soft else case.experts_per_token
        varies |= bool((count_T != declared).any())
    assert varies is case.facts.variable_k


@every_router
def test_use_and_beware_are_sentences(case: Case) -> None:
    for key in ("use", "beware"):
        text = getattr(case.facts, key)
        assert text, f"Facts.{key} of {case.name} is empty"
        assert text[0].isupper(), text
        assert text.endswith("."), text


def test_docs_pages_are_up_to_date(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--plugin"):
        pytest.skip("a plugin's routers are not on the pages")
    files = [DOCS / INDEX_FILE, *(DOCS / "routers").iterdir()]
    written = {file.relative_to(DOCS).as_posix(): file.read_text(encoding="utf-8") for file in files}
    rendered = render_router_pages()
    assert written.keys() == rendered.keys(), "make docs; a page without a family is deleted by hand"
    assert [name for name in rendered if written[name] != rendered[name]] == [], "make docs"
