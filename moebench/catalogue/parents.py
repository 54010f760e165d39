"""Models that cells can start from: their settings, and what a run has taken from its own parent."""

from pathlib import Path
from typing import Any

from moebench.pretrained.folder import PREFIX, open_pretrained
from moebench.pretrained.parent import read_parent
from moebench.runs.find_run import find_run


def describe_parent(name: str) -> dict[str, Any]:
    """Return the `base` of an experiment that starts from the folder `hf:PATH`; raise UsageError where none can."""
    path = Path(name.removeprefix(PREFIX)).expanduser().absolute()
    parent = read_parent(open_pretrained(f"{PREFIX}{path}" if name != PREFIX else name, requires_experts=False))
    return {"base": {**parent.settings, "init": {"from": f"{PREFIX}{path}"}}}


def describe_run(name: str, results: Path) -> dict[str, Any]:
    """Return the cell of the run `run:ID`, and what it has taken from its parent, if it has one.

    Raises UsageError for an id that no run of the results folder begins with, or several do.
    """
    folder = find_run(results, name.removeprefix("run:"))
    cell, taken = folder.read_cell(), folder.read_init()
    described = {key: cell[key] for key in ("id", "experiment", "arm", "seed")} | {"state": folder.describe_state()}
    return described | ({} if taken is None else {"init": taken}) | {"config": cell["config"]}
