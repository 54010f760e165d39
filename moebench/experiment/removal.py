"""`moebench rm`: remove runs, or an experiment with the runs that no other experiment has."""

import contextlib
import os
import shutil
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moebench.errors import UsageError, unknown
from moebench.runs.folder import RunFolder, list_run_folders
from moebench.tracking.address import sqlite_path
from moebench.tracking.mlflow_store import TrackerError
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.source import list_recorded_experiments

RUNS = """
select runs.run_uuid, tags.value from runs join experiments on experiments.experiment_id = runs.experiment_id
join tags on tags.run_uuid = runs.run_uuid and tags.key = 'moebench.cell'
where runs.lifecycle_stage = 'active' and (:experiment is null or experiments.name = :experiment)
"""


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
    tuning: str = ""
    """The experiment that has its tuning runs, which stay; empty: none."""

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
            tuning=next((other for other, record in experiments.items() if record.get("tuning_of") == name), ""),
        )
    matching = [cell_id for cell_id in folders if name and cell_id.startswith(name)]
    if len(matching) > 1:
        raise UsageError(f"rm: '{name}' begins {len(matching)} ids ({', '.join(matching)}); give a longer prefix")
    if not matching:
        raise unknown("run or experiment", name, [*experiments, *folders])
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
    path = sqlite_path(uri)
    if uri == "none" or (path is not None and not path.exists()):
        return None
    try:
        if path is None:
            return f"tracker {uri.rpartition('@')[2]}: its runs must be deleted there"
        ids = {folder.path.name for folder in removal.runs} | {*removal.kept}
        names = {*ids, "experiment"} if removal.experiment else ids
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            rows = connection.execute(RUNS, {"experiment": removal.experiment}).fetchall()
        with silence_mlflow():
            from mlflow import MlflowClient

            client = MlflowClient(uri)
            for run_id in [run_id for run_id, cell in rows if cell in names]:
                client.delete_run(run_id)
    except (sqlite3.Error, TrackerError) as error:
        return f"tracker: its runs could not be marked as deleted ({error})"
    return None
