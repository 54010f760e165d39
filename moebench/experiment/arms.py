"""The arms of an experiment: every combination of its grid, resolved, checked and named."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.compatibility import check_cell
from moebench.config import cell_id, component_keys, merge_settings, nest, resolve, to_plain
from moebench.conversion import convert
from moebench.errors import UsageError, require, require_text, suggest
from moebench.experiment.axes import (
    ARM,
    component_name,
    has_no_effect,
    lacks_option,
    note_dropped_axes,
    refuse_varied_keys,
)
from moebench.experiment.parents import complete_parents
from moebench.schema import COMPONENTS, CellConfig, ExperimentConfig
from moebench.tasks.contract import read_source_digest


@dataclass(frozen=True, kw_only=True)
class Arm:
    """All seeds of one setting."""

    label: str
    config: CellConfig
    """Configuration of every seed; its field `seed` is not used."""
    varies: Mapping[str, Any]
    """The configuration keys in which the arms differ, with this arm's values."""
    data_digest: str
    axes: Mapping[str, str]
    """Grid key -> label of this arm's value, for the keys that mean something to the arm."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """One combination of grid values, as written in the file."""

    choices: tuple[tuple[str, Any], ...]
    """Grid key and value, with the label, of the keys that mean something to the arm."""
    dropped: tuple[str, ...]
    """The other grid keys."""
    raw: Mapping[str, Any]
    """The cell's configuration without overrides, untyped."""


def read_data_digest(config: CellConfig) -> str:
    """Return the digest of the data that a cell names, which are read."""
    return read_source_digest(config.task)


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """How arms are resolved."""

    on_progress: Callable[[int, int], None] = lambda number, total: None
    """Called with the number of arms that are checked and that of all."""
    find_digest: Callable[[CellConfig], str] = read_data_digest
    """Returns the digest of the data of a cell."""
    results: Path | None = None
    """Results folder with the runs that `init.from` names by the beginning of their ids."""


DEFAULT_RESOLUTION = Resolution()


def resolve_arms(
    config: ExperimentConfig, overrides: Mapping[str, Any], where: str, resolution: Resolution
) -> tuple[list[Arm], tuple[str, ...]]:
    """Resolve and check every arm, and return them with notes on what was left out of the grid.

    Raises UsageError if an arm could not be trained or equals another.
    """
    require(isinstance(config.base, Mapping), "base", str(config.base) or "null", "a mapping of keys to values")
    if "seed" in config.base or "seed" in overrides:
        raise UsageError("seed: the experiment sets it; choose with seeds=[...] instead")
    refuse_varied_keys(_flatten("", overrides), config.grid, "grid")
    refuse_varied_keys(_flatten("", overrides), config.tune.grid, "tune.grid")
    points = list(_combine(config.grid, merge_settings({}, config.base)))
    _refuse_unknown(overrides, [point.raw for point in points], config.grid)
    raws = [merge_settings(point.raw, _select_applicable(overrides, point.raw, config.grid)) for point in points]
    configs = [complete_parents(resolve(raw), resolution.results) for raw in raws]
    axes = [_label_axes(point, config.grid, cell) for point, cell in zip(points, configs, strict=True)]
    labels = [", ".join(of_arm.values()) or str(cell.router.name) for of_arm, cell in zip(axes, configs, strict=True)]
    remedy = _advise(overrides, config.grid)
    _refuse_equal_labels(labels, configs, where, remedy)
    arms: list[Arm] = []
    for number, (point, cell) in enumerate(zip(points, configs, strict=True)):
        resolution.on_progress(number, len(points))
        _check_arm(cell, labels[number], is_only=len(points) == 1)
        digest = resolution.find_digest(cell)
        varies = _list_varied_keys(point, cell)
        arms.append(Arm(label=labels[number], config=cell, varies=varies, data_digest=digest, axes=axes[number]))
    _refuse_equal_cells(arms, where, remedy)
    dropped = {label: point.dropped for label, point in zip(labels, points, strict=True) if point.dropped}
    return arms, tuple(note_dropped_axes(dropped))


def _check_arm(cell: CellConfig, label: str, *, is_only: bool) -> None:
    """Raise UsageError, with the arm where there are several, for a cell that could not be trained."""
    try:
        check_cell(cell)
    except UsageError as error:
        if is_only:
            raise
        raise UsageError(f"{error}; arm '{label}'") from error


def note_partial_overrides(
    overrides: Mapping[str, Any], arms: Sequence[Arm], grid: Mapping[str, Any]
) -> tuple[str, ...]:
    """Return a note for each override that applies to some arms only."""
    notes = []
    for kind in _varied_components(overrides, grid):
        for option in overrides[kind]:
            labels = [arm.label for arm in arms if hasattr(getattr(arm.config, kind), option)]
            if len(labels) < len(arms):
                notes.append(f"{kind}.{option} applies to {', '.join(labels)}; the other arms have no such key")
    return tuple(notes)


def _combine(grid: Mapping[str, Sequence[Any]], base: Mapping[str, Any]) -> Iterator[_Point]:
    """Yield each combination of the grid; of those that differ only in keys that mean nothing to them, the first.

    A key that means nothing to any combination is kept in all of them: an error or equal cells follow, which name it.
    """
    axes = [[(key, number, value) for number, value in enumerate(values)] for key, values in grid.items()]
    combinations = list(itertools.product(*axes))
    raws = [_merge_choices(base, choices) for choices in combinations]
    inapplicable = [{key for key in grid if lacks_option(raw, key) or has_no_effect(raw, key)} for raw in raws]
    everywhere = set(grid).intersection(*inapplicable)
    seen = set()
    for choices, raw, keys in zip(combinations, raws, inapplicable, strict=True):
        dropped = keys - everywhere
        identity = tuple((key, number) for key, number, _ in choices if key not in dropped)
        if identity not in seen:
            seen.add(identity)
            settings = [choice for choice in choices if choice[0] not in dropped or not lacks_option(raw, choice[0])]
            yield _Point(
                choices=tuple((key, value) for key, _, value in choices if key not in dropped),
                dropped=tuple(key for key in grid if key in dropped),
                raw=_merge_choices(base, settings),
            )


def _merge_choices(base: Mapping[str, Any], choices: Iterable[tuple[str, int, Any]]) -> dict[str, Any]:
    raw = dict(base)
    for key, _, value in choices:
        for part, setting in _expand_settings(key, value).items():
            raw = merge_settings(raw, nest(part, setting))
    return raw


def _expand_settings(key: str, value: Any) -> dict[str, Any]:
    """Return the keys of a cell that a grid value sets."""
    if key == ARM and not (isinstance(value, Mapping) and "label" in value):
        raise UsageError(f"grid.{ARM}: each entry is a mapping of keys to values with a label, got {value}")
    if not isinstance(value, Mapping):
        return {key: value}
    rest = {name: item for name, item in value.items() if name != "label"}
    return rest if key == ARM else {key: rest}


def _label_axes(point: _Point, grid: Mapping[str, Sequence[Any]], cell: CellConfig) -> dict[str, str]:
    """Return the label of an arm on each axis; together they are the arm's label."""
    plain = to_plain(cell)
    return {key: _format_choice(key, value, grid[key], plain) for key, value in point.choices}


def _format_choice(key: str, value: Any, values: Sequence[Any], plain: Mapping[str, Any]) -> str:
    if isinstance(value, Mapping) and "label" in value:
        label: str = convert(value["label"], str, f"grid.{key}: label")
        require(bool(label.strip()), f"grid.{key}: label", repr(label), "a text that is not blank")
        require_text(label, f"grid.{key}: label")
        return label
    if not isinstance(value, Mapping):
        return str(value) if key in COMPONENTS else f"{key.split('.')[-1]}={_pick_typed(value, _look_up(plain, key))}"
    name = str(value.get("name", key))
    names = [str(item.get("name", "")) if isinstance(item, Mapping) else str(item) for item in values]
    typed = _pick_typed(value, _look_up(plain, key))
    options = [f"{option}={item}" for option, item in typed.items() if option != "name"]
    return " ".join([name, *options]) if names.count(name) > 1 else name


def _list_varied_keys(point: _Point, cell: CellConfig) -> dict[str, Any]:
    plain = to_plain(cell)
    varies: dict[str, Any] = {}
    for key, value in point.choices:
        for part, setting in _expand_settings(key, value).items():
            named = {"name": setting} if part in COMPONENTS and isinstance(setting, str) else setting
            varies |= _flatten(part, _pick_typed(named, _look_up(plain, part)))
    return varies


def _look_up(plain: Any, key: str) -> Any:
    """Return the value of a resolved cell at a dotted key, None if an override has removed it."""
    for part in key.split("."):
        plain = plain.get(part) if isinstance(plain, Mapping) else None
    return plain


def _pick_typed(given: Any, resolved: Any) -> Any:
    """Return the values of a resolved cell for the given keys only, without its defaults."""
    if isinstance(given, Mapping):
        return {key: _pick_typed(value, _look_up(resolved, key)) for key, value in given.items()}
    if isinstance(given, list) and isinstance(resolved, list) and len(given) == len(resolved):
        return [_pick_typed(*pair) for pair in zip(given, resolved, strict=True)]
    return resolved


def _advise(overrides: Mapping[str, Any], grid: Mapping[str, Any]) -> str:
    """Return what to do about equal arms: choose the values of the grid, where an override has made them equal."""
    entries = [entry for entry in grid.get(ARM, ()) if isinstance(entry, Mapping)]
    sections = {part.split(".")[0]: ARM for entry in entries for part in entry}
    sections |= {key.split(".")[0]: key for key in grid if key != ARM}
    for key in _flatten("", overrides):
        if (axis := sections.get(key.split(".")[0])) is not None:
            return f"; {key} is set for all of them: leave it out, or choose the arms with 'grid.{axis}=[...]'"
    return "; leave one out"


def _refuse_equal_labels(labels: Sequence[str], configs: Sequence[CellConfig], where: str, remedy: str) -> None:
    for label, count in Counter(labels).items():
        if count > 1:
            first, second, *_ = (config for name, config in zip(labels, configs, strict=True) if name == label)
            if first == second:
                raise UsageError(f"{where}: grid: the arm '{label}' occurs twice{remedy}")
            raise UsageError(f"{where}: grid: two arms are called '{label}'; give one of them a label: key")


def _refuse_equal_cells(arms: Sequence[Arm], where: str, remedy: str) -> None:
    """Raise UsageError for arms that are one training run under two names."""
    seen: dict[str, Arm] = {}
    for arm in arms:
        twin = seen.setdefault(cell_id(arm.config, arm.data_digest), arm)
        if twin is arm:
            continue
        first, second = (_flatten("", to_plain(each.config)) for each in (twin, arm))
        differing = sorted(key for key in {*first, *second} if first.get(key) != second.get(key))
        keys = f"differ only in {', '.join(differing)}, which changes no result" if differing else "have equal settings"
        raise UsageError(
            f"{where}: grid: the arms '{twin.label}' and '{arm.label}' are the same cells: they {keys}{remedy}"
        )


def _refuse_unknown(overrides: Mapping[str, Any], raws: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]) -> None:
    """Raise UsageError for an override of a varied component that no arm has."""
    for kind in _varied_components(overrides, grid):
        options = overrides[kind]
        if not isinstance(options, Mapping) or "name" in options:
            raise UsageError(f"{kind}: the grid varies it; choose with 'grid.{kind}=[...]' instead")
        known = set().union(*(component_keys(kind, component_name(raw, kind)) for raw in raws)) - {"name"}
        for option in options:
            if option not in known:
                raise UsageError(
                    f"{kind}.{option}: no {kind} of this grid has a key '{option}'.{suggest(option, known)}"
                    f" Allowed: {', '.join(sorted(known))}"
                )


def _select_applicable(overrides: Mapping[str, Any], raw: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that apply to an arm: in a grid of routers, an option applies to those that have it."""
    kept = dict(overrides)
    for kind in _varied_components(overrides, grid):
        fields = component_keys(kind, component_name(raw, kind))
        kept[kind] = {key: value for key, value in overrides[kind].items() if key in fields}
    return kept


def _varied_components(overrides: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
    """Return the components that the grid varies and an override changes."""
    entries = [entry for entry in grid.get(ARM, ()) if isinstance(entry, Mapping)]
    keys = {*grid, *(part.split(".")[0] for entry in entries for part in entry)}
    return [kind for kind in COMPONENTS if kind in keys and kind in overrides]


def _flatten(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    below = {f"{key}.{part}" if key else part: item for part, item in value.items()}
    return {name: item for part, inner in below.items() for name, item in _flatten(part, inner).items()}
