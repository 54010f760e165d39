"""The runs that belong together: a run, the other seeds of its arm, and the dense run of each seed."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.analysis.specialisation.report import find_run
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.launch.cell_check import require_unchanged_data
from moebench.registry import load_plugin, require_plugins
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.schema import CellConfig

COMMON = ("task", "model", "train")
"""Sections that a dense run must have in common with the run that it is a reference of."""


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """A finished run and its configuration."""

    folder: RunFolder
    cell: Mapping[str, Any]
    config: CellConfig

    @property
    def arm(self) -> str:
        """The label of its arm."""
        return str(self.cell["arm"])


@dataclass(frozen=True, kw_only=True)
class SeedPair:
    """A run and the dense run of the same seed; None where there is none."""

    run: FinishedRun
    dense: FinishedRun | None


def find_pairs(results: Path, subject: str, plugins: Sequence[str] = ()) -> tuple[SeedPair, ...]:
    """Return the run and then the other finished seeds of its arm, each with its dense reference.

    Raises UsageError for an unknown run, one that is not done, a plug-in that is not given, and changed data.
    """
    for plugin in plugins:
        load_plugin(plugin)
    folder = find_run(results, subject)
    if folder.state() != "done":
        raise UsageError(f"run {folder.path.name} is {folder.state()} (allowed: a run that is done)")
    cell = folder.read_cell()
    require_plugins(cell["plugins"], cell.get("plugin_digests") or (), f"run {folder.path.name}")
    config = resolve(cell["config"])
    require_unchanged_data(cell, config)
    run = FinishedRun(folder=folder, cell=cell, config=config)
    others = list(_list_related(results, run))
    dense = {other.config.seed: other for other in others if other.config.router.name == "dense"}
    seeds = sorted(
        (other for other in others if _without_seed(other.cell) == _without_seed(cell)),
        key=lambda other: other.config.seed,
    )
    return tuple(SeedPair(run=each, dense=dense.get(each.config.seed)) for each in (run, *seeds))


def _list_related(results: Path, run: FinishedRun) -> Iterator[FinishedRun]:
    """Yield the other finished runs on the same task, model and training; damaged ones are left out."""
    for folder in list_run_folders(results):
        try:
            cell = folder.read_cell()
            is_related = cell["data"] == run.cell["data"] and all(
                cell["config"].get(section) == run.cell["config"].get(section) for section in COMMON
            )
            if is_related and folder.path.name != run.folder.path.name and folder.state() == "done":
                yield FinishedRun(folder=folder, cell=cell, config=resolve(cell["config"]))
        except UsageError:
            continue


def _without_seed(cell: Mapping[str, Any]) -> dict[str, Any]:
    plugins = cell.get("plugin_digests") or ()
    return {"config": {key: value for key, value in cell["config"].items() if key != "seed"}, "plugins": list(plugins)}
