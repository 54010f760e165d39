"""`run --dry-run`: which cells a run would train; writes nothing."""

from collections import Counter
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.plan import cell_state
from moebench.experiment.store import DAMAGED, require_one_file
from moebench.runs.attempts import read_attempts
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

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
    """Return a JSON-ready row for each cell: its state, what a run would do, and from which step on."""
    require_one_file(results, experiment)
    return [_describe_cell(results, cell) for cell in {cell.id: cell for cell in experiment.cells}.values()]


def summarise_actions(rows: list[dict[str, Any]]) -> str:
    """Return in one line what a run would do."""
    states = Counter(row["state"] for row in rows)
    num_trained = sum(ACTIONS[row["state"]] not in ("-", "fail") for row in rows)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    return f"would train {num_trained} of {len(rows)} cells ({counts}); nothing was written"


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
        "arm": cell.arm,
        "seed": cell.seed,
        "state": state,
        "action": ACTIONS[state],
        "from_step": max(folder.checkpointed_step, 0) if starts_training else None,
        "steps": cell.config.train.steps,
        "attempts": len(read_attempts(folder.attempts)),
        "error": error,
    }
