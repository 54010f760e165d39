"""Write the files of run folders, for tests that need runs without training."""

from pathlib import Path
from typing import Any

from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult


def write_cell(folder: Path, **fields: Any) -> None:
    """Write cell.json of a run folder; fields that are not given have minimal values."""
    defaults: dict[str, Any] = {
        "id": folder.name,
        "arm": "switch",
        "seed": 0,
        "experiment": "probe",
        "config": {},
        "data": {"name": "text", "digest": "d"},
    }
    RunFolder(folder).write_cell({**defaults, **fields})


def write_result(folder: Path, **fields: Any) -> None:
    """Write result.json of a run folder; fields that are not given have minimal values."""
    defaults: dict[str, Any] = {
        "id": folder.name,
        "arm": "switch",
        "seed": 0,
        "status": "done",
        "error": None,
        "step": 1,
        "metrics": {},
        "cost": {},
        "throughput": {},
        "data_digest": "d",
        "eval_digest": "e",
        "marks": (),
        "config": {},
    }
    RunFolder(folder).write_result(RunResult(**{**defaults, **fields}))
