"""Experts that a child has beyond those of its parent (`init.new_experts`).

DEMix (arXiv:2108.05036, section 6) adds an expert for a new domain: it starts as a copy of the expert that predicts the
text of the domain best, and is trained alone, so that the other domains keep their predictions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.errors import UsageError, require
from moebench.experts.bank import is_sharded
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.evaluation import batch_context, evaluation_mode, select_rank_part, training_precision
from moebench.training.initial_weights.branch_domains import find_domain_router
from moebench.training.initial_weights.domain_experts import BY_DOMAIN
from moebench.training.initial_weights.stacks import copy_experts
from moebench.training.model import Model

NUM_BATCHES = 16
"""Batches of training that the losses of experts are compared on."""


def check_new_experts(config: CellConfig) -> None:
    """Raise UsageError for `nearest` with a router whose experts are not those of domains."""
    choice = config.init.new_experts
    fits = choice != "nearest" or config.router.name in BY_DOMAIN
    require(fits, "init.new_experts", choice, f"random or mean with router '{config.router.name}'")


@torch.no_grad()
def fill_new_experts(config: CellConfig, model: Model, task: Task, mesh: Mesh = SINGLE_PROCESS_MESH) -> dict[int, str]:
    """Give new experts the weights that `init.new_experts` names, in place; return expert -> what it is a copy of.

    All processes of the mesh call it, after the weights of the parent are loaded. A bank without experts of a parent
    keeps its own.
    """
    choice = config.init.new_experts
    state = model.state_dict()
    stacks = {name: new for name, new in model.new_experts.items() if 0 < len(new) < state[name].shape[0]}
    if choice == "random" or not stacks:
        return {}
    new_experts = sorted({expert for new in stacks.values() for expert in new})
    nearest = _find_nearest(config, model.to(mesh.device), task, new_experts, mesh) if choice == "nearest" else {}
    for name, new in stacks.items():
        values = _read_stack(state[name])
        old = [expert for expert in range(len(values)) if expert not in new]
        mean = values[old].mean(0)
        copy_experts(state[name], {expert: values[nearest[expert].expert] if nearest else mean for expert in new})
    return {expert: str(nearest[expert]) if nearest else "the mean of the others" for expert in new_experts}


def _read_stack(stack: Tensor) -> Tensor:
    """Return all experts of a stack, on every process."""
    return stack.full_tensor().clone() if is_sharded(stack) else stack.clone()


@dataclass(frozen=True, kw_only=True)
class NearestExpert:
    """The expert whose loss on the text of a new domain is lowest."""

    expert: int
    domain: str
    nats: float
    """Mean loss of a prediction."""

    def __str__(self) -> str:
        """Return the expert, its domain and its loss."""
        return f"expert {self.expert} of {self.domain}, {self.nats:.4f} nats"


def _find_nearest(
    config: CellConfig, model: Model, task: Task, new_experts: Sequence[int], mesh: Mesh
) -> dict[int, NearestExpert]:
    """Return for each new expert the old one that predicts the training text of its domain best."""
    router = find_domain_router(model)
    assert router is not None  # see `check_new_experts`
    domains, num_experts = router.domains, router.num_experts
    old = [number for number in range(min(len(domains), num_experts)) if number not in new_experts]
    losses = {number: _sum_losses(config, model, task, task.domains.index(domains[number]), mesh) for number in old}
    nearest = {}
    for expert in new_experts:
        index = task.domains.index(domains[expert]) if expert < len(domains) else len(task.domains)
        if index >= task.num_trained_domains:
            raise UsageError(
                f"init.new_experts: nearest, and expert {expert} has no domain with text of training (allowed: random,"
                " mean, or one new expert for each new domain in router.domains)"
            )
        means = {number: (nats_D[index] / count_D[index]).item() for number, (nats_D, count_D) in losses.items()}
        best = min(means, key=lambda number: means[number])
        nearest[expert] = NearestExpert(expert=best, domain=domains[best], nats=means[best])
    return nearest


def _sum_losses(config: CellConfig, model: Model, task: Task, as_domain: int, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """Return nats_D and count_D of the first batches of training, all routed as if they were of one domain."""
    nats_D, count_D = (torch.zeros(len(task.domains), dtype=torch.float64) for _ in range(2))
    train = config.train
    for step in range(NUM_BATCHES):
        batch = task.train_batch(train.batch_size, config.seed, train.skip_batches + step)
        part = select_rank_part(batch, mesh, model)
        nats_D.index_add_(0, part.domain_B, _compute_losses(config, model, task, part, as_domain))
        count_D.index_add_(0, part.domain_B, torch.full_like(part.domain_B, part.num_predictions, dtype=torch.float64))
    device = mesh.device
    return mesh.world.sum(nats_D.to(device)).cpu(), mesh.world.sum(count_D.to(device)).cpu()


def _compute_losses(config: CellConfig, model: Model, task: Task, batch: Batch, as_domain: int) -> Tensor:
    """Return the sum of the losses of each sequence, routed by a given label as in training."""
    device = next(model.parameters()).device
    routed = replace(batch, domain_B=torch.full_like(batch.domain_B, as_domain)).to(device)
    with evaluation_mode(model), training_precision(config.train, device):
        output, _ = model(routed, batch_context(routed, training=True, seed=config.seed))
        return task.loss(output, routed).double().sum(1).cpu()
