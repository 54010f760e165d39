"""Parents of cells (`init.from`): completed before a cell has an id, and checked before anything is trained.

What reads weights is imported where a cell has a parent: it imports PyTorch's compiler, which other plans do without.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import Parent
from moebench.runs.cell import Cell
from moebench.schema import CellConfig


def complete_parents(config: CellConfig, results: Path | None) -> CellConfig:
    """Return the configuration with all that its id depends on: full ids of runs, and digests of folders.

    Raises UsageError for a beginning of an id that no run of the results folder has, or several have, for a path that
    is no folder, and for one with another digest than the configuration has.
    """
    if not config.init.has_parent:
        return config
    from moebench.training.initial_weights.folder import digest_folders, require_same_folders

    init = config.init.replace_parents([_complete(parent, results) for parent in config.init.parents])
    if init.digest is None:
        return replace(config, init=replace(init, digest=digest_folders(init)))
    require_same_folders(init)
    return replace(config, init=init)


def _complete(parent: Parent, results: Path | None) -> Parent:
    """Return the parent with the full id of a run, or with a path that does not depend on the working folder."""
    if parent.kind == "run":
        from moebench.training.initial_weights.parent import complete_run_id

        return replace(parent, name=complete_run_id(parent.name, results))
    if parent.kind == "hf":
        return replace(parent, name=str(Path(parent.name).expanduser().absolute()))
    return parent


def require_parents(cells: Sequence[Cell], costs: ModelCosts) -> None:
    """Raise UsageError for a cell whose parent is missing, not done or damaged, or does not fit its model.

    Nothing is loaded. Of a parent in an earlier stage that is not done yet, the model that it will have must fit.
    """
    with_parents = [cell for cell in cells if cell.config.init.has_parent]
    if not with_parents:
        return
    from moebench.experiment.parent_check import check_parents

    checked: set[tuple[str, str, str]] = set()
    for cell in with_parents:
        key = (cell.stage, cell.arm, str(cell.config.init.from_))
        if key in checked:
            continue
        checked.add(key)
        try:
            check_parents(cell, costs)
        except UsageError as error:
            raise UsageError(f"{cell.arm}: {error}") from error
