"""Settings that a grid varies: they may be chosen on the validation split, not on the test split."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from moebench.analysis.compare.values import Split
from moebench.config import NOT_IN_ID

SECTIONS = ("model", "train", "balance")
"""Sections of a configuration that every algorithm has: a grid that varies a key of them is a tuning grid."""


def note_varied_settings(
    configs: Sequence[Mapping[str, Any]], split: Split, tuned_keys: Collection[str] = ()
) -> list[str]:
    """Return a note on the split to choose settings on, if these configurations differ in any that was not tuned."""
    is_tuned = tuple(f"{key}." for key in tuned_keys)
    settings = [key for key in find_varied_settings(configs) if not is_tuned or not f"{key}.".startswith(is_tuned)]
    if not settings:
        return []
    varied = f"this grid varies {', '.join(settings)}"
    report = "report what was chosen on test with fresh seeds"
    if split == "validation":
        return [f"{varied}: choose on validation, as here, and {report}"]
    return [f"{varied}: who chooses by this table tunes on test; choose with --split validation, and {report}"]


def find_varied_settings(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys of settings that differ between these configurations.

    A key of `SECTIONS` counts wherever it differs; a coefficient of an auxiliary loss where one and the same router
    has several: other algorithms have their own losses. All else in a router, layout or task belongs to the
    algorithm.
    """
    settings = {
        f"{section}.{key}"
        for section in SECTIONS
        for key in _list_differing_keys(config.get(section, {}) for config in configs)
        if key not in NOT_IN_ID.get(section, ())  # it changes no result, and may be that of an earlier run
    }
    losses: dict[str, list[Mapping[str, Any]]] = {}
    for config in configs:
        router = config.get("router", {})
        losses.setdefault(str(router.get("name")), []).append(router.get("losses", {}))
    settings |= {
        f"router.losses.{loss}" for of_router in losses.values() for loss in _list_differing_keys(of_router, 0.0)
    }
    return sorted(settings)


def _list_differing_keys(mappings: Iterable[Mapping[str, Any]], default: Any = None) -> list[str]:
    """Return the keys whose values differ; `default` is the value of an absent key."""
    all_mappings = list(mappings)
    keys = dict.fromkeys(key for mapping in all_mappings for key in mapping)
    return [key for key in keys if len({repr(mapping.get(key, default)) for mapping in all_mappings}) > 1]
