"""`moebench rm`: remove runs, or an experiment with the runs that no other experiment has."""

import contextlib
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.errors import UsageError, build_unknown_error
from moebench.runs.experiment_record import find_served_experiment
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.tracking.address import NO_TRACKER
from moebench.tracking.mlflow_store import TrackerError
from moebench.tracking.source import list_recorded_experiments
from moebench.tracking.stored_runs import EXPERIMENT, delete_runs


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What a call removes."""

    experiment: str | None
    """Name of the experiment; None: a single run."""
    runs: Sequence[RunFolder]
    kept: Sequence[str]
    """Runs of the experiment that stay, because other experiments have them."""
    files: Sequence[Path]
    """Record and figures of the experiment."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Experiments that have its tuning runs, or those of its earlier stages, which stay -> what they are."""

    @property
    def num_bytes(self) -> int:
        """Size of all files; links are not followed."""
        paths = [path for folder in self.runs for path in folder.path.rglob("*")]
        paths += [path for file in self.files for path in (file, *file.rglob("*"))]
        return sum(path.lstat().st_size for path in paths)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "experiment": self.experiment,
            "runs": [folder.path.name for folder in self.runs],
            "kept": list(self.kept),
            "bytes": self.num_bytes,
        }


def plan_removal(results: Path, name: str) -> Removal:
    """Return what the name of an experiment, or the beginning of a run's id, stands for.

    Raises UsageError for any other name.
    """
    experiments = list_recorded_experiments(results)
    folders = {folder.path.name: folder for folder in list_run_folders(results)}
    if name in experiments:
        ids = [cell["id"] for cell in experiments[name]["cells"]]
        others = {cell["id"] for other, record in experiments.items() if other != name for cell in record["cells"]}
        paths = [results / "experiments" / f"{name}.json", results / "experiments" / name]
        return Removal(
            experiment=name,
            runs=[folders[cell_id] for cell_id in dict.fromkeys(ids) if cell_id in folders and cell_id not in others],
            kept=[cell_id for cell_id in dict.fromkeys(ids) if cell_id in others],
            files=[path for path in paths if path.exists()],
            earlier={
                other: "tuning runs" if record.get("tuning_of") else "runs of an earlier stage"
                for other, record in experiments.items()
                if find_served_experiment(record) == name
            },
        )
    matching = [cell_id for cell_id in folders if name and cell_id.startswith(name)]
    if len(matching) > 1:
        raise UsageError(f"rm: '{name}' matches {len(matching)} ids ({', '.join(matching)}); give a longer prefix")
    if not matching:
        raise build_unknown_error("run or experiment", name, [*experiments, *folders])
    return Removal(experiment=None, runs=[folders[matching[0]]], kept=[], files=[])


def remove(results: Path, removal: Removal, uri: str) -> str | None:
    """Remove what was planned; raise UsageError, before anything is removed, if a run is being trained.

    Runs are marked as deleted in the tracker first. Returns why that failed, or None.
    """
    with contextlib.ExitStack() as locks:
        for folder in removal.runs:
            try:
                locks.enter_context(FileLock(folder.lock, timeout=0))
            except Timeout as error:
                raise UsageError(f"rm: {folder.path.name} is being trained; nothing was removed") from error
        problem = _delete_in_tracker(results, removal, uri)
        for path in (*[folder.path for folder in removal.runs], *removal.files):
            _remove(results, path)
    return problem


def _remove(results: Path, path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
        return
    # A folder out of the way first: a removal that is interrupted must not leave half a run.
    trash = results / f".removed-{path.name}-{os.getpid()}"
    os.rename(path, trash)
    shutil.rmtree(trash)


def _delete_in_tracker(results: Path, removal: Removal, uri: str) -> str | None:
    """Mark the runs as deleted in the tracker: in its experiment, or in all of them for a single run."""
    if uri == NO_TRACKER:
        return None
    ids = {folder.path.name for folder in removal.runs}
    if removal.experiment:
        ids |= {*removal.kept, EXPERIMENT}
    try:
        delete_runs(results, uri, ids, removal.experiment)
    except TrackerError as error:
        return f"{error}: its runs are not marked as deleted there"
    return None
