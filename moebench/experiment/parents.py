"""Parents of cells (`init.from`): completed before a cell has an id, and checked before anything is trained."""

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import Parent
from moebench.runs.cell import Cell
from moebench.schema import CellConfig
from moebench.training.initial_weights.load import open_parent
from moebench.training.initial_weights.parent import complete_run_id
from moebench.training.initial_weights.plan import plan_load
from moebench.training.initial_weights.settings import check_settings


def complete_parents(config: CellConfig, results: Path | None) -> CellConfig:
    """Return the configuration with all that its id depends on: full ids of runs.

    Raises UsageError for a beginning of an id that no run of the results folder has, or several have.
    """
    if not config.init.has_parent:
        return config
    parents = [str(_complete(parent, results)) for parent in config.init.parents]
    from_ = parents[0] if isinstance(config.init.from_, str) else parents
    return replace(config, init=replace(config.init, from_=from_))


def _complete(parent: Parent, results: Path | None) -> Parent:
    return replace(parent, name=complete_run_id(parent.name, results)) if parent.kind == "run" else parent


def require_parents(cells: Sequence[Cell], costs: ModelCosts, planned: Set[str] = frozenset()) -> None:
    """Raise UsageError for a cell whose parent is missing, not done or damaged, or does not fit its model.

    Nothing is loaded. `planned`: ids of runs that are trained before the cells; they are not checked yet.
    """
    checked: set[tuple[str, str]] = set()
    for cell in cells:
        key = (cell.arm, str(cell.config.init.from_))
        are_planned = all(parent.name in planned for parent in cell.config.init.parents)
        if are_planned or key in checked:
            continue
        checked.add(key)
        try:
            check_parents(cell.config, costs)
        except UsageError as error:
            raise UsageError(f"{cell.arm}: {error}") from error


def check_parents(config: CellConfig, costs: ModelCosts) -> None:
    """Raise UsageError unless the parents of a cell can be read and fit its model."""
    for name in config.init.parents:
        parent = open_parent(name, costs.results)
        check_settings(config, parent.settings, parent.label)
        plan_load(config, costs.facts(config).shapes, parent)
