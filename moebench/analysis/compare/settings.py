"""Which settings a grid varies: what may be chosen on the validation split, and not on the test split."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moebench.analysis.compare.values import Split

SECTIONS = ("model", "train", "balance")
"""Of a configuration, what is the same for every algorithm: a grid that varies a key of these tunes it."""


def settings_notes(configs: Sequence[Mapping[str, Any]], split: Split) -> list[str]:
    """Say, where these configurations differ in settings, on which split to choose them."""
    settings = varied_settings(configs)
    if not settings:
        return []
    varied = f"this grid varies {', '.join(settings)}"
    report = "report what was chosen on test with fresh seeds"
    if split == "validation":
        return [f"{varied}: choose on validation, as here, and {report}"]
    return [f"{varied}: who chooses by this table tunes on test; choose with --split validation, and {report}"]


def varied_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of settings that differ between these configurations.

    A key of `SECTIONS` counts wherever it differs; a coefficient of an auxiliary loss where one and the same router
    has several: other algorithms have losses of their own. All else in a router, layout or task is the algorithm.
    """
    found = {
        f"{section}.{key}" for section in SECTIONS for key in _differing(config.get(section, {}) for config in configs)
    }
    losses: dict[str, list[Mapping[str, Any]]] = {}
    for config in configs:
        router = config.get("router", {})
        losses.setdefault(str(router.get("name")), []).append(router.get("losses", {}))
    found |= {f"router.losses.{loss}" for of_router in losses.values() for loss in _differing(of_router, 0.0)}
    return sorted(found)


def _differing(mappings: Iterable[Mapping[str, Any]], default: Any = None) -> list[str]:
    """Return the keys whose values are not the same everywhere; `default`: the value of a key that is not there."""
    known = list(mappings)
    keys = dict.fromkeys(key for mapping in known for key in mapping)
    return [key for key in keys if len({repr(mapping.get(key, default)) for mapping in known}) > 1]
