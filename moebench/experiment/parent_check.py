"""Whether the parents of a cell can be read and fit its model; nothing is loaded."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor
from typing_extensions import override

from moebench.config import to_plain
from moebench.errors import UsageError
from moebench.experiment.model_costs import ModelCosts
from moebench.init_config import Parent
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.training.initial_weights.combining import join_parents
from moebench.training.initial_weights.domain_experts import select_expert_domains
from moebench.training.initial_weights.load import open_parent
from moebench.training.initial_weights.new_experts import check_new_experts
from moebench.training.initial_weights.parent import ParentWeights
from moebench.training.initial_weights.plan import plan_load
from moebench.training.initial_weights.settings import check_settings


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
            _require_one_name(name, parent)
        check_settings(cell.config, parent.settings, parent.label)
        parents.append(select_expert_domains(cell.config, parent, domains, _list_known(domains, parent)))
    if parents:
        check_new_experts(cell.config)
        shapes = costs.facts(cell.config).shapes
        plan_load(cell.config, shapes, join_parents(cell.config, parents, shapes, domains))


def _require_one_name(name: Parent, parent: ParentWeights) -> None:
    """Raise UsageError for the last step of a run by its number: one training would have two ids."""
    if name.step is not None and name.step == parent.settings["train"]["steps"]:
        raise UsageError(f"init.from: '{name}' is the last step of the run (allowed: run:{name.name})")


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
