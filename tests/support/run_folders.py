"""Write the files of run folders, for tests that need runs without training."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.runs.result import RunResult
from moebench.training.model import prepare_task


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


def write_data_digests(results: Path, cells: Iterable[Cell]) -> None:
    """Write the digests of each cell's data and evaluation into its result, as training does."""
    for cell in cells:
        task = prepare_task(cell.config, results)
        folder = RunFolder.of(results, cell.id)
        result = folder.read_result()
        assert result is not None
        config = {"task": {"name": cell.config.task.name}}
        folder.write_result(
            replace(result, data_digest=task.digest, eval_digest=task.eval_digest, config=result.config | config)
        )


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
