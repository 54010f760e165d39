"""The settings of a curve: the syntax of --vary."""

import re
from pathlib import Path

import pytest

from moebench.analysis.sweep.axes import Axis, check_number, list_settings, parse_axes
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.training.trained_model import apply_evaluation_settings

CONFIGS = [resolve({"router": name}) for name in ("dense", "switch", "v_moe", "top_p")]
CAPACITY = "layout.capacity_factor_eval"


@pytest.mark.parametrize(
    ("texts", "axes"),
    [
        ([f"{CAPACITY}=0.5,1"], {CAPACITY: ("0.5", "1")}),
        (["capacity=null, 0.5"], {CAPACITY: ("null", "0.5")}),
        (["top_k=1,2"], {"router.top_k": ("1", "2")}),
        (["drop_order=score", "router.top_p=0.3"], {"layout.drop_order": ("score",), "router.top_p": ("0.3",)}),
        (["capacity=0.5,1,top_k=1,2"], {CAPACITY: ("0.5", "1"), "router.top_k": ("1", "2")}),
    ],
)
def test_keys_and_values(texts: list[str], axes: dict[str, tuple[str, ...]]) -> None:
    assert {axis.key: axis.values for axis in parse_axes(texts, CONFIGS)} == axes


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ([], ["--vary", "KEY=v1,v2"]),
        ([""], ["--vary: ''", "KEY=v1,v2"]),
        (["capacity"], ["'capacity'", "KEY=v1,v2"]),
        (["capacity="], ["'capacity='"]),
        (["capacity=1,,2"], ["'capacity=1,,2'"]),
        (["capacity=1,1"], ["names a value twice"]),
        (["capacity=1", f"{CAPACITY}=2"], [f"'{CAPACITY}' is named twice"]),
        (["capacty=1"], ["--vary: 'capacty'", "Did you mean 'capacity'"]),
        (["layout.capacity_eval=1"], ["--vary: layout: 'capacity_eval'", "Did you mean 'capacity_factor_eval'"]),
        (["router.nothing=1"], ["--vary: router: 'nothing'", "Allowed: priority, top_k, top_p"]),
        (["name=switch"], ["'name' is ambiguous", "layout.name, router.name"]),
    ],
)
def test_mistakes_are_one_line(texts: list[str], words: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        parse_axes(texts, CONFIGS)
    assert all(word in str(caught.value) for word in words)


def test_an_unknown_key_names_only_keys_that_may_vary() -> None:
    with pytest.raises(UsageError) as caught:
        parse_axes(["nothing=1"], CONFIGS)
    _, _, allowed = str(caught.value).partition("Allowed: ")
    assert allowed == ("capacity, capacity_factor_eval, capacity_rule, drop_order, overflow, priority, top_k, top_p")


def test_the_values_of_the_documentation_work_for_the_default_router() -> None:
    page = (Path(__file__).parents[3] / "docs" / "compute.md").read_text()
    examples = re.findall(r"--vary ([a-z_]+=\S+?)[`\s]", page)
    assert len(examples) >= 3
    config = resolve({"router": "top_k"})
    for axis in (axis for example in examples for axis in parse_axes([example], [config])):
        for value in axis.values:
            apply_evaluation_settings(config, [f"{axis.key}={value}"])


def test_the_first_axis_changes_fastest() -> None:
    axes = [Axis(key="a", values=("1", "2")), Axis(key="b", values=("x", "y"))]
    assert [tuple(settings.values()) for settings in list_settings(axes)] == [
        ("1", "x"), ("2", "x"), ("1", "y"), ("2", "y"),
    ]  # fmt: skip


def test_a_product_without_end_is_refused() -> None:
    axes = [Axis(key=str(number), values=("1", "2", "3", "4")) for number in range(30)]
    with pytest.raises(UsageError, match="more than 200 combinations"):
        check_number(axes)
