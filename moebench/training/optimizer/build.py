"""Build the optimizer and the schedule of a cell."""

from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_base_model
from moebench.training.optimizer.groups import describe_parameters, group_parameters
from moebench.training.optimizer.muon import Muon
from moebench.training.optimizer.mup import compute_width_factors
from moebench.training.optimizer.schedule import compute_rate_factor
from moebench.training.optimizer.sharded import ShardedAdamW, ShardedMuon


def build_optimizer(
    config: CellConfig, model: Model, task: Task, mesh: Mesh = SINGLE_PROCESS_MESH
) -> torch.optim.AdamW:
    """Build the optimizer of a model's parameters, at the peak of their learning rates."""
    train = config.train
    roles = describe_parameters(model)
    factors = compute_width_factors(config, roles, build_base_model(config, task))
    groups = group_parameters(roles, train, factors)
    is_sharded = config.parallel.shard_optimizer and mesh.size > 1
    options: dict[str, Any] = {"lr": train.learning_rate, "betas": (train.beta1, train.beta2), "fused": True}
    if train.optimizer == "adamw":
        return ShardedAdamW(groups, mesh, **options) if is_sharded else torch.optim.AdamW(groups, **options)
    options |= {
        "linear_maps": {role.parameter: role.linear_map for role in roles if role.linear_map is not None},
        "momentum": train.muon_momentum,
        "scaling": train.muon_scaling,
        "precision": torch.bfloat16 if train.precision == "bf16" else torch.float32,
    }
    return ShardedMuon(groups, mesh, **options) if is_sharded else Muon(groups, **options)


def build_schedule(config: CellConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Build the schedule of all parameter groups."""
    return LambdaLR(optimizer, lambda step: compute_rate_factor(step, config.train))
