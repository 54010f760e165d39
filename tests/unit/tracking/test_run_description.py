"""All resolved settings become parameters that every tracker takes."""

import re
from typing import Any

from moebench.tracking.run_description import MAX_NAME_LENGTH, MAX_PARAM_LENGTH, MAX_PARAMS, list_params


def params_of(config: dict[str, Any], **varies: Any) -> dict[str, str]:
    return list_params({"config": config, "varies": varies})


def test_settings_are_flat_and_those_that_vary_come_first() -> None:
    config = {"model": {"d_model": 32}, "router": {"name": "switch", "losses": {"z": 0.1}}, "seed": 3}
    params = params_of(config, **{"router.name": "switch"})
    assert [*params.items()] == [
        ("router.name", "switch"),
        ("model.d_model", "32"),
        ("router.losses.z", "0.1"),
        ("seed", "3"),
    ]


def test_values_of_every_kind_are_texts() -> None:
    params = params_of({"a": None, "b": [1, 2], "c": {}, "d": True, "e": ""})
    assert params == {"a": "None", "b": "[1, 2]", "c": "{}", "d": "True", "e": "''"}


def test_limits_of_trackers_are_kept() -> None:
    deep: dict[str, Any] = {"end": 1}
    for _ in range(300):
        deep = {"level": deep}
    config = {"../x": 1, "päth/€[": 2, "long" * 200: "v" * 9000, "deep": deep}
    params = params_of(config | {f"key{number}": number for number in range(1000)})
    assert len(params) == MAX_PARAMS
    assert max(map(len, params)) <= MAX_NAME_LENGTH
    assert max(map(len, params.values())) <= MAX_PARAM_LENGTH
    assert all(re.fullmatch(r"[A-Za-z0-9_\-. :]+", name) and name[0] != "." for name in params)


def test_a_cell_without_varied_settings_has_parameters() -> None:
    assert list_params({"config": {"seed": 1}, "varies": None}) == {"seed": "1"}
