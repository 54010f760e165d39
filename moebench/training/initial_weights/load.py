"""Load a parent's weights into a model whose own initial weights are drawn."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.init_config import Parent
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.schema import CellConfig
from moebench.seeds import make_generator
from moebench.training.initial_weights.branch_domains import find_domain_router
from moebench.training.initial_weights.combining import AveragedParents, join_parents
from moebench.training.initial_weights.domain_experts import select_expert_domains
from moebench.training.initial_weights.folder import open_folder, require_same_folders
from moebench.training.initial_weights.parent import ParentWeights, open_run
from moebench.training.initial_weights.plan import BANK, CopyMethod, LoadPlan, TensorCopy, plan_load
from moebench.training.initial_weights.settings import check_settings
from moebench.training.initial_weights.stacks import copy_experts
from moebench.training.initial_weights.upcycling import make_expert
from moebench.training.model import Model


@dataclass(frozen=True, kw_only=True)
class LoadedWeights:
    """What a model has taken."""

    parent: str
    """Label of the parent."""
    plan: LoadPlan
    new_experts: Mapping[str, tuple[int, ...]]
    """Stack of experts -> experts that have their own initial values."""
    copied_experts: Mapping[int, str] = field(default_factory=dict)
    """New expert -> what `init.new_experts` has made it a copy of."""
    combined: Mapping[str, str] = field(default_factory=dict)
    """Tensor of several parents together -> how it comes about."""


def open_parent(parent: Parent, results: Path, mesh: Mesh = SINGLE_PROCESS_MESH) -> ParentWeights:
    """Open the weights of a parent; raise UsageError where they cannot be read."""
    if parent.kind == "run":
        return open_run(parent, results, mesh)
    if parent.kind == "hf":
        return open_folder(parent)
    raise UsageError(f"init.from: '{parent}' is known only inside an experiment with stages")


def load_initial_weights(
    config: CellConfig, model: Model, results: Path, mesh: Mesh = SINGLE_PROCESS_MESH
) -> LoadedWeights | None:
    """Replace the weights of a model, in place, by what `init` takes from its parent; None without a parent.

    All processes of the mesh call it, after the model's own weights are drawn; each loads the experts that it holds.
    Raises UsageError where the parent cannot be read or does not fit.
    """
    if not config.init.has_parent:
        return None
    require_same_folders(config.init, mesh)
    opened = [open_parent(name, results, mesh) for name in config.init.parents]
    state, router = model.state_dict(), find_domain_router(model)
    domains, known = ((), ()) if router is None else (router.domains, router.data_domains)
    for each in opened:
        check_settings(config, each.settings, each.label)
    parents = [select_expert_domains(config, each, domains, known) for each in opened]
    shapes = {name: value.shape for name, value in state.items()}
    parent = join_parents(config, parents, shapes, domains)
    plan = plan_load(config, shapes, parent)
    loaded = take_weights(config, plan, state, parent)
    model.new_experts = loaded.new_experts
    return loaded


@torch.no_grad()
def take_weights(
    config: CellConfig, plan: LoadPlan, state: Mapping[str, Tensor], parent: ParentWeights
) -> LoadedWeights:
    """Fill the tensors of a model, in place, as planned."""
    parent.load({each.source: state[each.target] for each in plan.of(CopyMethod.WHOLE)})
    new_experts: dict[str, tuple[int, ...]] = {}
    for each in plan.of(CopyMethod.ROWS):
        target, first = state[each.target], parent.shapes[each.source][0]
        rows = torch.empty(parent.shapes[each.source], dtype=target.dtype)
        parent.load({each.source: rows})
        copy_experts(target, dict(enumerate(rows)))
        if BANK.fullmatch(each.target):
            new_experts[each.target] = tuple(range(first, target.shape[0]))
    for network in _group_networks(plan.of(CopyMethod.NETWORK)):
        new_experts |= _make_experts(config, network, state, parent)
    for name in plan.zeroed:
        state[name].zero_()
    new_experts |= {name: tuple(range(state[name].shape[0])) for name in plan.new if BANK.fullmatch(name)}
    combined = {}
    if isinstance(parent, AveragedParents):
        combined = {each.target: parent.describe(each.source) for each in plan.taken}
    return LoadedWeights(parent=parent.label, plan=plan, new_experts=new_experts, combined=combined)


def _group_networks(taken: list[TensorCopy]) -> list[list[TensorCopy]]:
    """Return the weights that are taken into stacks of experts, those of one bank together."""
    banks: dict[str, list[TensorCopy]] = {}
    for each in taken:
        banks.setdefault(each.target.rpartition(".")[0], []).append(each)
    return list(banks.values())


def _make_experts(
    config: CellConfig, bank: list[TensorCopy], state: Mapping[str, Tensor], parent: ParentWeights
) -> dict[str, tuple[int, ...]]:
    """Fill a bank with copies of a dense network; return stack -> experts that are no copies."""
    options = config.init.upcycle
    loaded = {each.source: torch.empty(parent.shapes[each.source]) for each in bank}
    parent.load(loaded)
    network = {name.rpartition(".")[2]: value for name, value in loaded.items()}
    targets = {each.source.rpartition(".")[2]: state[each.target] for each in bank}
    num_experts = next(iter(targets.values())).shape[0]
    num_copies = num_experts if options.copies == "all" else min(options.copies, num_experts)
    place = bank[0].target.rpartition(".")[0]
    for expert in range(num_copies):
        weights = make_expert(network, options, make_generator(config.seed, "upcycle", place, expert))
        for name, value in weights.items():
            copy_experts(targets[name], {expert: value})
    return {each.target: tuple(range(num_copies, num_experts)) for each in bank if num_copies < num_experts}
