"""From an experiment file to its cells: every arm for every seed, seeds outermost."""

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moebench.config import cell_id, component_fields, layer_over, load_experiment, resolve, to_plain, with_overrides
from moebench.errors import UsageError, nearest, require, unknown
from moebench.registry import load_plugin
from moebench.schema import COMPONENTS, DEFAULT_NAMES, CellConfig, ExperimentConfig
from moebench.tasks.task import TASKS
from moebench.training.model import check_cell

ARM = "arm"
"""The grid key whose values set several keys of a cell at once."""

BASELINE = "dense"
"""What routers are compared with when no experiment says otherwise."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid: a training run, wanted or done."""

    id: str
    arm: str
    seed: int
    config: CellConfig
    varies: Mapping[str, Any]
    """What tells this cell from the others: configuration key -> value."""
    plugins: tuple[str, ...]
    """Plugin files that must be loaded before it can be built."""
    data_digest: str
    """Of the data source, as it entered the id."""

    def to_dict(self, experiment: str) -> dict[str, Any]:
        """Return the cell as written to its run folder."""
        return {
            "id": self.id,
            "arm": self.arm,
            "seed": self.seed,
            "experiment": experiment,
            "config": to_plain(self.config),
            "varies": dict(self.varies),
            "plugins": list(self.plugins),
            "data": {"name": self.config.task.name, "digest": self.data_digest},
        }


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment with its cells, every one of them checked."""

    name: str
    file: str
    question: str
    baseline: str
    cells: tuple[Cell, ...]
    """Seeds outermost, so that every prefix of the grid is a fair comparison."""
    notes: tuple[str, ...]
    """What a user should know before it runs."""

    @property
    def arms(self) -> list[str]:
        """The arms in the order of the grid."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))


def expand(path: Path, overrides: Sequence[str] = (), plugins: Sequence[str] = ()) -> Experiment:
    """Read an experiment file and build its cells; raise UsageError for anything that could not be trained."""
    digests = [load_plugin(plugin) for plugin in plugins]  # first: they may name what the file uses
    config, cell_overrides = load_experiment(path, overrides)
    regridded = any(override.startswith(("grid", "seeds")) for override in overrides)
    return _build(path, config, cell_overrides, dict(zip(plugins, digests, strict=True)), regridded=regridded)


def expand_routers(
    routers: Sequence[str], task: str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> Experiment:
    """Build the experiment that compares routers with the dense model, everything else at its default."""
    digests = {plugin: load_plugin(plugin) for plugin in plugins}
    arms = list(dict.fromkeys([BASELINE, *routers]))
    config = ExperimentConfig(
        question=f"How do {' and '.join(routers)} compare with a dense model on {task}?",
        base={"task": {"name": task}},
        grid={"router": arms},
        baseline=BASELINE,
    )
    return expand_config("-".join(["compare", *routers]), config, overrides, digests)


def expand_config(
    name: str, config: ExperimentConfig, overrides: Sequence[str] = (), plugins: Mapping[str, str] | None = None
) -> Experiment:
    """Build the cells of an experiment that no file describes; `plugins`: file -> digest, loaded already."""
    config, cell_overrides = with_overrides(config, overrides)
    return _build(Path(name), config, cell_overrides, plugins or {}, regridded=False)


def _build(
    path: Path,
    config: ExperimentConfig,
    cell_overrides: Mapping[str, Any],
    plugins: Mapping[str, str],
    *,
    regridded: bool,
) -> Experiment:
    arms = _resolved_arms(config, cell_overrides, str(path))
    baseline, note = _baseline(config.baseline, [arm.label for arm in arms], regridded=regridded)
    files = tuple(str(Path(plugin).resolve()) for plugin in plugins)
    cells = [_cell(arm, seed, list(plugins.values()), files) for seed in config.seeds for arm in arms]
    return Experiment(
        name=path.stem,
        file=str(path),
        question=config.question,
        baseline=baseline,
        cells=tuple(cells),
        notes=(*_unused_overrides(cell_overrides, arms, config.grid), *note),
    )


@dataclass(frozen=True, kw_only=True)
class _Arm:
    label: str
    config: CellConfig
    varies: Mapping[str, Any]
    data_digest: str


def _resolved_arms(config: ExperimentConfig, overrides: Mapping[str, Any], where: str) -> list[_Arm]:
    """Check every arm, before anything is trained."""
    require(isinstance(config.base, Mapping), "base", str(config.base), "a mapping of keys to values")
    if "seed" in config.base or "seed" in overrides:
        raise UsageError("seed: the experiment sets it; choose with seeds=[...] instead")
    combinations = list(_arms(config.grid, layer_over({}, config.base), overrides))
    for label, count in Counter(label for label, _, _ in combinations).items():
        if count > 1:
            raise UsageError(f"{where}: grid: two arms are called '{label}'; give one of them a label: key")
    _refuse_unknown(overrides, [raw for _, raw, _ in combinations], config.grid)
    arms = []
    for label, raw, varies in combinations:
        cell = resolve(layer_over(raw, _applicable(overrides, raw, config.grid)), where)
        check_cell(cell)
        digest = TASKS.get(cell.task.name).item.source_digest(cell.task)
        arms.append(_Arm(label=label, config=cell, varies=varies, data_digest=digest))
    return arms


def _cell(arm: _Arm, seed: int, plugin_digests: Sequence[str], plugins: tuple[str, ...]) -> Cell:
    config = replace(arm.config, seed=seed)
    return Cell(
        id=cell_id(config, arm.data_digest, plugin_digests),
        arm=arm.label,
        seed=seed,
        config=config,
        varies={**arm.varies, "seed": seed},
        plugins=plugins,
        data_digest=arm.data_digest,
    )


def _arms(
    grid: Mapping[str, Sequence[Any]], base: Mapping[str, Any], overrides: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Yield (label, untyped cell configuration, what varies) for each combination of the grid."""
    axes = [[(key, value) for value in values] for key, values in grid.items()]
    for combination in itertools.product(*axes):
        raw = dict(base)
        varies: dict[str, Any] = {}
        labels = []
        for key, value in combination:
            value, label = _without_label(key, value, grid[key])
            labels.append(label)
            for part, setting in (value if key == ARM else {key: value}).items():
                raw = layer_over(raw, _nested(part, setting))
                named = {"name": setting} if part in COMPONENTS and isinstance(setting, str) else setting
                varies |= _flat(part, named)
        yield ", ".join(labels) or _name_of(layer_over(raw, overrides), "router"), raw, varies


def _without_label(key: str, value: Any, values: Sequence[Any]) -> tuple[Any, str]:
    """Return a grid value without its `label`, and the name of the arm that it makes."""
    if key == ARM and not (isinstance(value, Mapping) and "label" in value):
        raise UsageError(f"grid.{ARM}: each entry is a mapping of keys to values with a label, got {value}")
    if not isinstance(value, Mapping):
        return value, str(value) if key in COMPONENTS else f"{key.split('.')[-1]}={value}"
    rest = {name: item for name, item in value.items() if name != "label"}
    if "label" in value:
        return rest, str(value["label"])
    name = str(rest.get("name", key))
    same_name = sum((item if isinstance(item, str) else item.get("name", "")) == name for item in values)
    options = [f"{option}={item}" for option, item in rest.items() if option != "name"]
    return rest, " ".join([name, *options]) if same_name > 1 else name


def _refuse_unknown(overrides: Mapping[str, Any], raws: Sequence[Mapping[str, Any]], grid: Mapping[str, Any]) -> None:
    """Refuse an override of a varied component that no arm knows."""
    for kind in _varied(overrides, grid):
        options = overrides[kind]
        if not isinstance(options, Mapping) or "name" in options:
            raise UsageError(f"{kind}: the grid varies it; choose with 'grid.{kind}=[...]' instead")
        known = set().union(*(component_fields(kind, _name_of(raw, kind)) for raw in raws)) - {"name"}
        for option in options:
            if option not in known:
                raise UsageError(
                    f"{kind}.{option}: no {kind} of this grid has a key '{option}'.{nearest(option, known)}"
                    f" Allowed: {', '.join(sorted(known))}"
                )


def _applicable(overrides: Mapping[str, Any], raw: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that this arm has: in a grid of routers, an option belongs to the routers that know it."""
    kept = dict(overrides)
    for kind in _varied(overrides, grid):
        fields = component_fields(kind, _name_of(raw, kind))
        kept[kind] = {key: value for key, value in overrides[kind].items() if key in fields}
    return kept


def _unused_overrides(overrides: Mapping[str, Any], arms: Sequence[_Arm], grid: Mapping[str, Any]) -> tuple[str, ...]:
    """Note each override that only some arms know."""
    notes = []
    for kind in _varied(overrides, grid):
        for option in overrides[kind]:
            having = [arm.label for arm in arms if hasattr(getattr(arm.config, kind), option)]
            if len(having) < len(arms):
                notes.append(f"{kind}.{option} applies to {', '.join(having)}; the other arms have no such key")
    return tuple(notes)


def _varied(overrides: Mapping[str, Any], grid: Mapping[str, Any]) -> list[str]:
    """Return the components that the grid varies and an override changes."""
    keys = {*grid, *(part.split(".")[0] for entry in grid.get(ARM, ()) for part in entry)}
    return [kind for kind in COMPONENTS if kind in keys and kind in overrides]


def _baseline(wanted: str | None, arms: Sequence[str], *, regridded: bool) -> tuple[str, tuple[str, ...]]:
    if wanted is None or wanted in arms:
        return wanted or arms[0], ()
    if regridded:
        return arms[0], (f"baseline '{wanted}' is not in this grid; '{arms[0]}' takes its place",)
    raise unknown("baseline", wanted, arms)


def _name_of(raw: Mapping[str, Any], kind: str) -> str:
    value = raw.get(kind, {})
    return value if isinstance(value, str) else str(value.get("name", DEFAULT_NAMES[kind]))


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _flat(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {key: value}
    return {name: item for part, below in value.items() for name, item in _flat(f"{key}.{part}", below).items()}
