"""A run as its folder describes it, and the runs that belong to it: other seeds of its arm, and dense references."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moebench.config import cell_id, resolve
from moebench.errors import UsageError
from moebench.launch.cell_check import require_unchanged_data
from moebench.registry import load_plugin, require_plugins
from moebench.runs.find_run import find_run
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.schema import CellConfig

DENSE = "dense"


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRun:
    """A run, its cell as stored, and its configuration."""

    folder: RunFolder
    cell: dict[str, Any]
    config: CellConfig

    @property
    def id(self) -> str:
        """The id of its cell."""
        return self.folder.path.name

    @property
    def arm(self) -> str:
        """The label of its arm."""
        return str(self.cell["arm"])

    @property
    def seed(self) -> int:
        """Its seed."""
        return self.config.seed

    def require_done(self, section: str) -> None:
        """Raise UsageError, for a section of `probe`, unless the run is done."""
        state = self.folder.state()
        if state != "done":
            raise UsageError(f"--show {section}: run {self.id} is {state} (allowed: a run that is done)")


def read_run(folder: RunFolder) -> StoredRun:
    """Read a run; raise UsageError where it is damaged, needs plug-ins that are not loaded, or its data was changed."""
    cell = folder.read_cell()
    require_plugins(cell["plugins"], cell.get("plugin_digests") or (), f"run {folder.path.name}")
    config = resolve(cell["config"])
    require_unchanged_data(cell, config)
    return StoredRun(folder=folder, cell=cell, config=config)


def find_stored_run(results: Path, run: str, plugins: Sequence[str] = ()) -> StoredRun:
    """Read the run whose id begins with `run`; raise UsageError as `find_run` and `read_run` do.

    `plugins`: those that the run needs; the files that its folder names are not executed by themselves.
    """
    folder = find_run(results, run)
    for plugin in plugins:
        load_plugin(plugin)
    return read_run(folder)


def find_other_seeds(run: StoredRun, results: Path) -> list[StoredRun]:
    """Return the finished runs that differ from a run in their seed alone, by seed; damaged ones are left out."""
    own_id = _compute_id(run, run.config)
    others = [
        other
        for other in _list_finished(results, run.config.router.name)
        if other.seed != run.seed and _compute_id(other, replace(other.config, seed=run.seed)) == own_id
    ]
    return sorted(others, key=lambda other: other.seed)


def find_dense_runs(run: StoredRun, results: Path) -> dict[int, StoredRun]:
    """Return seed -> another finished run that is dense and has the task, model and training of a run."""
    own_id = _compute_id(run, run.config)

    def is_reference(other: StoredRun) -> bool:
        sections = {name: getattr(other.config, name) for name in ("task", "model", "train")}
        return _compute_id(other, replace(run.config, **sections)) == own_id

    dense = [other for other in _list_finished(results, DENSE) if other.id != run.id and is_reference(other)]
    return {other.seed: other for other in dense}


def _list_finished(results: Path, router: str) -> Iterator[StoredRun]:
    """Yield the finished runs with a router; those that are damaged are left out."""
    for folder in list_run_folders(results):
        try:
            has_router = folder.read_cell()["config"].get("router", {}).get("name") == router
            if has_router and folder.state() == "done":
                yield read_run(folder)
        except UsageError:
            continue


def _compute_id(run: StoredRun, config: CellConfig) -> str:
    """Return the id that a run would have with a configuration."""
    return cell_id(config, run.cell["data"]["digest"], run.cell.get("plugin_digests") or ())
