"""From an experiment file to its cells: every arm for every seed, seeds outermost."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from moebench.config import apply_overrides, cell_id, load_experiment
from moebench.errors import unknown
from moebench.experiment.arms import Arm, resolve_arms, unused_overrides
from moebench.registry import Plugin, load_plugin, select_plugins
from moebench.runs.cell import Cell
from moebench.schema import ExperimentConfig

BASELINE = "dense"
"""What routers are compared with when no experiment says otherwise."""


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
    loaded = [load_plugin(plugin) for plugin in plugins]  # first: they may name what the file uses
    config, cell_overrides = load_experiment(path, overrides)
    regridded = any(override.startswith(("grid", "seeds")) for override in overrides)
    return _build(path, config, cell_overrides, loaded, regridded=regridded)


def expand_routers(
    routers: Sequence[str], task: str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> Experiment:
    """Build the experiment that compares routers with the dense model, everything else at its default."""
    loaded = [load_plugin(plugin) for plugin in plugins]
    arms = list(dict.fromkeys([BASELINE, *routers]))
    config = ExperimentConfig(
        question=f"How do {' and '.join(routers)} compare with a dense model on {task}?",
        base={"task": {"name": task}},
        grid={"router": arms},
        baseline=BASELINE,
    )
    return expand_config("-".join(["compare", *routers]), config, overrides, loaded)


def expand_config(
    name: str, config: ExperimentConfig, overrides: Sequence[str] = (), plugins: Sequence[Plugin] = ()
) -> Experiment:
    """Build the cells of an experiment that no file describes."""
    config, cell_overrides = apply_overrides(config, overrides)
    return _build(Path(name), config, cell_overrides, plugins, regridded=False)


def _build(
    path: Path,
    config: ExperimentConfig,
    cell_overrides: Mapping[str, Any],
    plugins: Sequence[Plugin],
    *,
    regridded: bool,
) -> Experiment:
    arms = resolve_arms(config, cell_overrides, str(path))
    baseline, note = _baseline(config.baseline, [arm.label for arm in arms], regridded=regridded)
    needed = [select_plugins(plugins, _collect_words(arm.config)) for arm in arms]
    cells = [_cell(arm, seed, own) for seed in config.seeds for arm, own in zip(arms, needed, strict=True)]
    return Experiment(
        name=path.stem,
        file=str(path),
        question=config.question,
        baseline=baseline,
        cells=tuple(cells),
        notes=(*unused_overrides(cell_overrides, arms, config.grid), *note),
    )


def _cell(arm: Arm, seed: int, plugins: Sequence[Plugin]) -> Cell:
    config = replace(arm.config, seed=seed)
    return Cell(
        id=cell_id(config, arm.data_digest, [plugin.digest for plugin in plugins]),
        arm=arm.label,
        seed=seed,
        config=config,
        varies={**arm.varies, "seed": seed},
        plugins=tuple(str(plugin.file) for plugin in plugins),
        data_digest=arm.data_digest,
    )


def _collect_words(value: Any) -> Iterator[str]:
    """Yield all that a configuration may name a component by: its texts, and the keys of its mappings."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for option in fields(value):
            yield from _collect_words(getattr(value, option.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _collect_words(item)
    elif isinstance(value, Mapping):
        yield from value
        yield from _collect_words(list(value.values()))


def _baseline(wanted: str | None, arms: Sequence[str], *, regridded: bool) -> tuple[str, tuple[str, ...]]:
    if wanted is None or wanted in arms:
        return wanted or arms[0], ()
    if regridded:
        return arms[0], (f"baseline '{wanted}' is not in this grid; '{arms[0]}' takes its place",)
    raise unknown("baseline", wanted, arms)
