"""A run as one row of a table: its settings and results by the names of columns."""

from typing import Any

from moebench.config import flatten
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder

CELL_COLUMNS = ("id", "experiment", "arm", "seed")
DAMAGED = "damaged"
"""Status of a run whose files cannot be read."""


def describe_run(folder: RunFolder) -> dict[str, Any]:
    """Return the settings and the results of one run, by the names of the columns."""
    try:
        cell, result = folder.read_cell(), folder.read_result()
    except UsageError as error:
        return {"id": folder.path.name, "status": DAMAGED, "error": str(error)}
    row = {key: cell[key] for key in CELL_COLUMNS}
    row |= {"status": folder.describe_state(), "error": result.error if result else None}
    row |= {key: value for key, value in flatten(cell["config"]) if key != "seed"}
    if result is not None:
        groups = {"test": result.metrics, "validation": result.validation}
        groups |= {"cost": result.cost, "throughput": result.throughput}
        row |= {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
    return row
