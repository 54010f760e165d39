"""`run --dry-run`: which cells a run would train; writes nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parents import require_parents
from moebench.experiment.plan import cell_state, list_planned_cells
from moebench.experiment.store import DAMAGED, require_one_file
from moebench.experiment.tuning import UNSETTLED, has_diverged, list_tuning_cells
from moebench.runs.attempts import read_attempts
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.cache import keep_cache_unchanged

ACTIONS = {
    "new": "train",
    "resumable": "resume",
    "failed": "train again",
    "stopped": "resume",
    "done": "-",
    DAMAGED: "fail",
}
"""State of a cell -> what a run does with it."""


def list_actions(experiment: Experiment, results: Path) -> list[dict[str, Any]]:
    """Return a JSON-ready row for each cell: its state, what a run would do, and from which step on.

    Earlier stages and tuning runs come first; runs of arms that have not chosen their settings yet have no id. Raises
    UsageError for a cell that would be trained and whose parent is missing, not done or does not fit it.
    """
    require_one_file(results, experiment)
    planned = list_planned_cells(experiment, results)
    rows = [
        _describe_cell(results, cell) if is_settled else _describe_unsettled(cell)
        for cell, is_settled in {cell.id: (cell, is_settled) for cell, is_settled in planned}.values()
    ]
    idle = {row["id"] for row in rows if row["action"] == "-"}
    with keep_cache_unchanged():
        require_parents([cell for cell, _ in planned if cell.id not in idle], ModelCosts(results))
    tuning = {cell.id for cell in list_tuning_cells(experiment)}
    return [row | {"action": "-"} if row["id"] in tuning and _is_decided(results, row) else row for row in rows]


def summarise_actions(rows: list[dict[str, Any]]) -> str:
    """Return in one line what a run would do."""
    states = Counter(row["state"] for row in rows)
    num_trained = sum(row["action"] not in ("-", "fail") for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"would train {num_trained} of {len(rows)} cells ({counts}); nothing was written"


def _is_decided(results: Path, row: dict[str, Any]) -> bool:
    return row["state"] == "failed" and has_diverged(results, row["id"])


def _name_stage(cell: Cell) -> dict[str, str]:
    return {"stage": cell.stage} if cell.stage else {}


def _describe_unsettled(cell: Cell) -> dict[str, Any]:
    row = {
        "id": None,
        **_name_stage(cell),
        "arm": cell.arm,
        "seed": cell.seed,
        "state": UNSETTLED,
        "action": "train",
        "from_step": 0,
    }
    return row | {"steps": cell.config.train.steps, "attempts": 0, "error": None}


def _describe_cell(results: Path, cell: Cell) -> dict[str, Any]:
    folder = RunFolder.of(results, cell.id)
    error = None
    try:
        state = cell_state(results, cell)
        result = folder.read_result()
        error = result.error if result else None
    except UsageError as damage:
        state, error = DAMAGED, str(damage)
    starts_training = ACTIONS[state] not in ("-", "fail")
    return {
        "id": cell.id,
        **_name_stage(cell),
        "arm": cell.arm,
        "seed": cell.seed,
        "state": state,
        "action": ACTIONS[state],
        "from_step": max(folder.checkpointed_step, 0) if starts_training else None,
        "steps": cell.config.train.steps,
        "attempts": len(read_attempts(folder.attempts)),
        "error": error,
    }
