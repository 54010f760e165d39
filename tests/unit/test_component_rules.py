"""The rules of registration hold for the components of moebench itself, which imports do not check."""

from typing import Any

import pytest

from moebench.component_rules import find_facts_problem, find_function_problem, find_method_problem
from moebench.registry import HOMES, get_registry

ENTRIES = [entry for kind in HOMES for entry in get_registry(kind).entries()]


@pytest.mark.parametrize("entry", ENTRIES, ids=[f"{entry.kind} {entry.name}" for entry in ENTRIES])
def test_built_in_components_keep_the_rules(entry: Any) -> None:
    find_problem = find_function_problem if entry.kind == "loss" else find_method_problem
    assert find_problem(entry.item) == ""
    assert find_facts_problem(entry.facts, type(entry.facts)) == ""
    assert not entry.is_plugin


def test_an_entry_is_labelled_by_its_file() -> None:
    entry = get_registry("router").get("switch")
    assert entry.label == f"router 'switch' ({entry.origin})"
    assert "routers/switch.py:" in entry.label
