"""Any value of any option of every router, layout and task is accepted, or refused in one line that names the key."""

from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.compatibility import check_cell
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experts.layout import LAYOUTS
from moebench.models.plan import plan_blocks
from moebench.routing.router import ROUTERS
from moebench.tasks.task import TASKS
from moebench.yaml_text import PlainScalar

REGISTRIES = {"router": ROUTERS, "layout": LAYOUTS, "task": TASKS}
COMPONENTS = [(section, name) for section, registry in REGISTRIES.items() for name in registry.names()]
NUMBERS = (
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1",
    "2",
    "3",
    "7",
    "0.5",
    "1.5",
    "1e400",
    "1e24",
    "9" * 400,
    "-0",
    "64",
    "1000000000",
    "-7",
)
TEXTS = ("", "null", "true", "yes", "täglich", "\u200b", "a\0b", "x" * 5000, "$\\frac{$", "../..", "[]", "{}", "'")
VALUES = st.recursive(
    st.sampled_from(NUMBERS + TEXTS).map(PlainScalar)
    | st.text(max_size=9).map(PlainScalar)
    | st.none()
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@cache
def list_options(section: str, name: str) -> tuple[str, ...]:
    """Return the options of a component, those inside of options included."""
    config = REGISTRIES[section].get(name).item.Config()
    options = [option.name for option in fields(config) if option.name != "name"]
    data = getattr(config, "data", None)
    return (*options, *([f"data.{option.name}" for option in fields(data)] if data is not None else []))


def require_one_line(section: str, name: str, changes: dict[str, Any]) -> None:
    """Resolve and check a cell whose component has these values: it is accepted, or refused in one line."""
    values: dict[str, Any] = {"name": name}
    for option, value in changes.items():
        outer, dot, inner = option.partition(".")
        values[outer] = {**values.get(outer, {}), inner: value} if dot else value
    message = "accepted"
    try:
        config = resolve({section: values})
        check_cell(config)
        plan_blocks(config)
    except UsageError as error:
        message = str(error)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 12_000


CHANGES = st.sampled_from(COMPONENTS).flatmap(
    lambda component: st.tuples(
        st.just(component), st.dictionaries(st.sampled_from(list_options(*component)), VALUES, min_size=1, max_size=3)
    )
)


@settings(max_examples=60)
@given(changes=CHANGES)
def test_options_of_some_components(changes: tuple[tuple[str, str], dict[str, Any]]) -> None:
    (section, name), options = changes
    require_one_line(section, name, {key: value for key, value in options.items() if key != "data"} or options)


@pytest.mark.slow
@pytest.mark.parametrize(("section", "name"), COMPONENTS)
def test_options_of_every_component(section: str, name: str) -> None:
    options = st.dictionaries(st.sampled_from(list_options(section, name)), VALUES, min_size=1, max_size=3)

    @settings(max_examples=120, suppress_health_check=list(HealthCheck))
    @given(changes=options)
    def check(changes: dict[str, Any]) -> None:
        has_parts = any(key.startswith("data.") for key in changes)
        require_one_line(
            section, name, {key: value for key, value in changes.items() if key != "data" or not has_parts}
        )

    check()


@pytest.mark.parametrize("section", REGISTRIES)
def test_every_value_of_the_list_for_every_option(section: str) -> None:
    """The numbers and texts that were mistaken before, one by one, for every option of a component."""
    seen: set[str] = set()
    for name in REGISTRIES[section].names():
        for option in set(list_options(section, name)) - seen - {"data"}:
            seen.add(option)
            for value in NUMBERS + TEXTS:
                require_one_line(section, name, {option: PlainScalar(value)})
