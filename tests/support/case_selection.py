"""Selection of test cases: which products of routers, options, sizes and modes run in `make test`.

`make test-all` runs the full products. `make test` runs a part of each and marks the rest slow, so that it stays a few
minutes as routers are added. The parts are chosen here:

- `parametrize_cases` (cases and axes of values): a router with its defaults meets every value of every axis, and over
  all routers every pair of values occurs. Other options meet one combination each, cycling through all of them, in
  every second test: half of them in one test, the other half in another.
- `parametrize_sizes` (cases with every number of experts): defaults at each number, other options at 8 and 1, again in
  every fourth test.
- `parametrize_pairs` (layouts and routers): every router on the plain layout, and every layout with one router of each
  family, cycling through the family, whose routers share the code path of a layout.
- `combine_axes` (axes of values): the combinations that the test lists.

The selection is deterministic: the same registry gives the same tests. With `-m "not slow"` the rest is not collected
at all, which would take as long as half a minute of tests.
"""

import itertools
import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import pytest
from _pytest.mark.expression import Expression
from support.cases import Case, all_cases

from moebench.experts.layout import LAYOUTS
from moebench.routing.router import ROUTERS

PLAIN_LAYOUT = "every_n"
NUM_PARTS = 4
"""A test has one part of the cases with options."""
Test = TypeVar("Test", bound=Callable[..., Any])


class Collection:
    """What this test run collects."""

    with_slow_cases = True
    """Set by `tests/conftest.py` before the tests are collected."""


def can_select_slow(markers: str) -> bool:
    """Return whether the expression of `-m` can select a test marked slow, with or without another marker."""
    if not markers:
        return True
    expression = Expression.compile(markers)
    return expression.evaluate(lambda name, /, **_: name == "slow") or expression.evaluate(lambda _, /, **__: True)


def parametrize_cases(
    cases: Sequence[Case],
    *,
    slow_values: Mapping[str, Sequence[str]] = MappingProxyType({}),
    **axes: Sequence[Any] | Mapping[str, Any],
) -> Callable[[Test], Test]:
    """Parametrise a test by `case` and axes (values, or id -> value); mark combinations outside `make test` slow.

    `slow_values` has the ids of values of an axis that are tested in `make test-all` alone.
    """
    named_axes = [
        axis if isinstance(axis, Mapping) else {str(value): value for value in axis} for axis in axes.values()
    ]
    every_id = [list(values) for values in named_axes]
    ids = [
        [name for name in values if name not in slow_values.get(axis, ())]
        for axis, values in zip(axes, every_id, strict=True)
    ]
    combinations = list(itertools.product(*ids))
    kept: set[Hashable] = set()
    default_count, option_count = itertools.count(), itertools.count()
    for case in cases:
        if case.options:
            kept.add((str(case), *combinations[next(option_count) % len(combinations)]))
            continue
        shift = next(default_count)  # shift the first axis, so that all pairs of values occur over the cases
        for turn in range(max(map(len, ids), default=1)):
            chosen = (values[(turn + shift * (not axis)) % len(values)] for axis, values in enumerate(ids))
            kept.add((str(case), *chosen))
    full = {
        (str(case), *chosen): (case, *(values[name] for values, name in zip(named_axes, chosen, strict=True)))
        for case in cases
        for chosen in itertools.product(*every_id)
    }
    return _parametrize_by_case(("case", *axes), full, kept)


def parametrize_sizes() -> Callable[[Test], Test]:
    """Parametrise a test by every case with every number of experts."""
    cases = {(str(case),): (case,) for case in all_cases()}
    kept = [key for key, (case,) in cases.items() if not case.options or case.num_experts in (1, 8)]
    return _parametrize_by_case(("case",), cases, kept)


def parametrize_pairs(
    refused: Callable[[str, str], Any] = lambda layout, router: False, *, each_family: bool = True
) -> pytest.MarkDecorator:
    """Parametrise a test by `layout` and `router`, with one router per family and layout in `make test`.

    A router that a layout refuses represents its family only if all are refused. Without `each_family` all routers form
    one family: for tests to which a router is only a name and its options.
    """
    families: dict[str, list[str]] = {}
    for entry in ROUTERS.entries():
        families.setdefault(entry.facts.family if each_family else "", []).append(entry.name)
    kept = {(PLAIN_LAYOUT, router) for router in ROUTERS.names()}
    for turn, layout in enumerate(LAYOUTS.names()):
        for routers in families.values():
            accepted = [router for router in routers if not refused(layout, router)] or routers
            kept.add((layout, accepted[turn % len(accepted)]))
    pairs = {pair: pair for pair in itertools.product(LAYOUTS.names(), ROUTERS.names())}
    return _parametrize(("layout", "router"), pairs, kept)


def _parametrize_by_case(
    names: Sequence[str], full: Mapping[tuple[str, ...], tuple[Any, ...]], kept: Iterable[Hashable]
) -> Callable[[Test], Test]:
    """Parametrise a test; of the kept cases with options, keep the part that belongs to the test's name."""
    kept = set(kept)
    options = list(dict.fromkeys((case.name, str(case.options)) for case, *_ in full.values() if case.options))
    index = {option: number for number, option in enumerate(options)}

    def decorate(test: Test) -> Test:
        part = zlib.crc32(test.__name__.encode()) % NUM_PARTS
        mine = {
            key
            for key, (case, *_) in full.items()
            if key in kept and (not case.options or index[case.name, str(case.options)] % NUM_PARTS == part)
        }
        return _parametrize(names, full, mine)(test)

    return decorate


def _parametrize(
    names: Sequence[str], full: Mapping[tuple[str, ...], tuple[Any, ...]], kept: Iterable[Hashable]
) -> pytest.MarkDecorator:
    kept = set(kept)
    assert kept <= full.keys()
    marks = {key: () if key in kept else pytest.mark.slow for key in full}
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(*values, id="-".join(key), marks=marks[key])
            for key, values in full.items()
            if key in kept or Collection.with_slow_cases
        ],
    )


def combine_axes(*axes: Sequence[Any], quick: Sequence[tuple[Any, ...]]) -> list[Any]:
    """Return the product of the axes as parameters, those that are not `quick` marked slow."""
    combinations = list(itertools.product(*axes))
    assert all(one in combinations for one in quick)
    return [
        pytest.param(*one, marks=() if one in quick else pytest.mark.slow)
        for one in combinations
        if one in quick or Collection.with_slow_cases
    ]
