"""Parents of cells (`init.from`): completed before a cell has an id, and checked before anything is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import Parent
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.schema import CellConfig
from moebench.training.initial_weights.combining import join_parents
from moebench.training.initial_weights.domain_experts import select_expert_domains
from moebench.training.initial_weights.folder import digest_folders, require_same_folders
from moebench.training.initial_weights.load import open_parent
from moebench.training.initial_weights.new_experts import check_new_experts
from moebench.training.initial_weights.parent import ParentWeights, complete_run_id
from moebench.training.initial_weights.plan import plan_load
from moebench.training.initial_weights.settings import check_settings


def complete_parents(config: CellConfig, results: Path | None) -> CellConfig:
    """Return the configuration with all that its id depends on: full ids of runs, and digests of folders.

    Raises UsageError for a beginning of an id that no run of the results folder has, or several have, for a path that
    is no folder, and for one with another digest than the configuration has.
    """
    if not config.init.has_parent:
        return config
    init = config.init.replace_parents([_complete(parent, results) for parent in config.init.parents])
    if init.digest is None:
        return replace(config, init=replace(init, digest=digest_folders(init)))
    require_same_folders(init)
    return replace(config, init=init)


def _complete(parent: Parent, results: Path | None) -> Parent:
    """Return the parent with the full id of a run, or with a path that does not depend on the working folder."""
    if parent.kind == "run":
        return replace(parent, name=complete_run_id(parent.name, results))
    if parent.kind == "hf":
        return replace(parent, name=str(Path(parent.name).expanduser().absolute()))
    return parent


def require_parents(cells: Sequence[Cell], costs: ModelCosts) -> None:
    """Raise UsageError for a cell whose parent is missing, not done or damaged, or does not fit its model.

    Nothing is loaded. Of a parent in an earlier stage that is not done yet, the model that it will have must fit.
    """
    checked: set[tuple[str, str, str]] = set()
    for cell in cells:
        key = (cell.stage, cell.arm, str(cell.config.init.from_))
        if key in checked:
            continue
        checked.add(key)
        try:
            check_parents(cell, costs)
        except UsageError as error:
            raise UsageError(f"{cell.arm}: {error}") from error


def check_parents(cell: Cell, costs: ModelCosts) -> None:
    """Raise UsageError unless the parents of a cell can be read and fit its model."""
    stages, parents = {parent.id: parent for parent in cell.parents}, list[ParentWeights]()
    domains = getattr(cell.config.router, "domains", ())
    for name in cell.config.init.parents:
        planned = stages.get(name.name)
        if planned is not None and not _is_done(planned, costs.results):
            parent: ParentWeights = PlannedWeights(planned, costs)
        else:
            parent = open_parent(name, costs.results)
        check_settings(cell.config, parent.settings, parent.label)
        parents.append(select_expert_domains(cell.config, parent, domains, _list_known(domains, parent)))
    if parents:
        check_new_experts(cell.config)
        shapes = costs.facts(cell.config).shapes
        plan_load(cell.config, shapes, join_parents(cell.config, parents, shapes, domains))


def _list_known(domains: Sequence[str], parent: ParentWeights) -> set[str]:
    """Return the domains that are known from the settings alone, before the data are read."""
    data = (parent.settings.get("task") or {}).get("data") or {}
    return {*domains, *(data.get("held_out_domains") or ())}


class PlannedWeights(ParentWeights):
    """The weights that a run of an earlier stage will have."""

    def __init__(self, cell: Cell, costs: ModelCosts) -> None:
        self.label = f"{cell.arm} of stage {cell.stage}"
        self.settings = to_plain(cell.config)
        self.shapes = costs.facts(cell.config).shapes

    @override
    def load(self, targets: Mapping[str, Tensor]) -> None:
        raise UsageError(f"init.from: {self.label} is not trained yet")


def _is_done(cell: Cell, results: Path) -> bool:
    try:
        return RunFolder.of(results, cell.id).state() == "done"
    except UsageError:  # damaged, which the run of its stage reports
        return False
