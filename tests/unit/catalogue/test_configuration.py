"""`moebench show SECTION` and docs/configuration.md: complete, current, as the schema enforces it."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moebench.catalogue.configuration import SECTIONS, describe_name, describe_section, render_configuration_page
from moebench.catalogue.options import COMPONENT_CONFIGS, component_options, format_default
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.ranges import Range, get_ranges
from moebench.registry import get_registry
from moebench.schema import TrainConfig
from moebench.training.module import compute_rate_factor

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_the_page_is_current(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--plugin"):
        pytest.skip("the components of a plugin are not on the page")
    assert PAGE.read_text() == render_configuration_page(), "docs/configuration.md is old: make docs"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_option_of_a_section_has_a_meaning(section: str) -> None:
    description = describe_section(section)
    assert description["about"]
    for option in description["options"]:
        assert option["about"], option["key"]
        assert option["values"], option["key"]


@pytest.mark.parametrize("kind", list(COMPONENT_CONFIGS))
def test_the_options_of_a_kind_are_those_of_its_components(kind: str) -> None:
    options = component_options(kind)
    for entry in get_registry(kind).entries():
        expected = {option["key"] for option in describe_name(entry.name)["options"]}
        assert {o.key for o in options if entry.name in o.components or not o.components} >= expected


def test_no_component_has_the_name_of_a_section() -> None:
    names = {name for kind in ("router", "layout", "task", "loss") for name in get_registry(kind).names()}
    assert not names & set(SECTIONS)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("train.steps", {"train.steps"}),
        ("task.few_shot", {"task.few_shot.shots", "task.few_shot.draws", "task.few_shot.ridge"}),
        ("data.tokenizer", {"task.data.tokenizer"}),
        ("router", {"router.name", "router.losses"}),
        ("cell", {"seed", "allow_noncausal"}),
    ],
)
def test_a_section_or_key_shows_its_options(name: str, keys: set[str]) -> None:
    assert {option["key"] for option in describe_name(name)["options"]} == keys


def test_data_is_short_for_the_data_of_a_task() -> None:
    assert describe_name("data") == describe_name("task.data")
    paths = [option for option in describe_name("data")["options"] if option["key"] == "task.data.path"]
    assert {"language", "speech", "vision"} <= {name for option in paths for name in option["components"]}


def test_a_component_shows_nested_options_with_its_own_defaults() -> None:
    options = {option["key"]: option for option in describe_name("keyword")["options"]}
    assert options["task.data.target_column"]["default"] == "label"
    assert options["task.data.num_mels"]["values"] == "int, between 8 and 80"


@pytest.mark.parametrize(
    ("name", "near"), [("trian", "'train'"), ("train.step", "'train.steps'"), ("swich", "'switch'")]
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name: str, near: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"'{name}' is unknown. Did you mean ")) as error:
        describe_name(name)
    assert near in str(error.value)
    assert "\n" not in str(error.value)


def numeric_options() -> list[tuple[str, dict[str, Any], Range]]:
    """Return key, untyped cell and range of every ranged option of train, model and parallel."""
    config = resolve({})
    return [
        (f"{section}.{name}", {section: {name: allowed.low - 1}}, allowed)
        for section in ("train", "model", "parallel")
        for name, allowed in get_ranges(type(getattr(config, section))).items()
    ]


@pytest.mark.parametrize(("key", "cell", "allowed"), numeric_options(), ids=lambda value: str(value)[:40])
def test_the_range_that_is_shown_is_enforced(key: str, cell: dict[str, Any], allowed: Range) -> None:
    (option,) = describe_name(key)["options"]
    assert option["allowed"].removesuffix(", or null") == str(allowed)
    violated = str(replace(allowed, limit=None))  # too small: the message leaves out the limit
    with pytest.raises(UsageError, match=f"{re.escape(key)} must be {re.escape(violated)}(, or null)?, got"):
        resolve(cell)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(low=1), [1, 5, math.inf], [0, math.nan], "at least 1"),
        (Range(low=0, includes_low=False), [0.1], [0, -1], "greater than 0"),
        (Range(low=0, includes_low=False, includes_high=False), [3], [0, math.inf], "greater than 0 and finite"),
        (Range(low=0, high=1), [0, 1], [1.1, -0.1], "between 0 and 1"),
        (Range(low=0, high=1, includes_high=False), [0], [1], "at least 0 and below 1"),
        (Range(low=0, high=1, includes_low=False), [1], [0], "greater than 0 and at most 1"),
    ],
)
def test_ranges(allowed: Range, inside: list[float], outside: list[float], text: str) -> None:
    assert str(allowed) == text
    assert all(value in allowed for value in inside)
    assert not any(value in allowed for value in outside)


def test_the_documented_schedule_is_the_one_of_training() -> None:
    formula = re.search(r"\n +(\(u .*?) +if u < warmup_steps\n +(final_rate .*?) +otherwise", TrainConfig.__doc__ or "")
    assert formula
    train = TrainConfig(steps=50, warmup_steps=7, final_rate=0.1)
    for u in range(train.steps + 2):
        p = min(1, (u - train.warmup_steps) / max(1, train.steps - train.warmup_steps))
        names = {**vars(train), "u": u, "p": p, "cos": math.cos, "pi": math.pi}
        documented = eval(formula[1] if u < train.warmup_steps else formula[2], names)
        assert documented == pytest.approx(compute_rate_factor(u, train))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "null"), (True, "true"), ([], "[]"), ({"z": 1e-3}, "{z: 0.001}"), ("", "''"), ([1, None], "[1, null]")],
)
def test_defaults_are_written_as_in_yaml(value: Any, text: str) -> None:
    assert format_default(value) == text
