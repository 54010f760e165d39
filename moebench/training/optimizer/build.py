"""Build the optimizer and the schedule of a cell."""

import torch
from torch.optim.lr_scheduler import LambdaLR

from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, build_base_model
from moebench.training.optimizer.groups import describe_parameters, group_parameters
from moebench.training.optimizer.muon import Muon
from moebench.training.optimizer.mup import compute_width_factors
from moebench.training.optimizer.schedule import compute_rate_factor


def build_optimizer(config: CellConfig, model: Model, task: Task) -> torch.optim.AdamW:
    """Build the optimizer of a model's parameters, at the peak of their learning rates."""
    train = config.train
    roles = describe_parameters(model)
    factors = compute_width_factors(config, roles, build_base_model(config, task))
    groups = group_parameters(roles, train, factors)
    betas = train.beta1, train.beta2
    if train.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=train.learning_rate, betas=betas, fused=True)
    return Muon(
        groups,
        {role.parameter: role.linear_map for role in roles if role.linear_map is not None},
        momentum=train.muon_momentum,
        scaling=train.muon_scaling,
        precision=torch.bfloat16 if train.precision == "bf16" else torch.float32,
        lr=train.learning_rate,
        betas=betas,
        fused=True,
    )


def build_schedule(config: CellConfig, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Build the schedule of all parameter groups."""
    return LambdaLR(optimizer, lambda step: compute_rate_factor(step, config.train))
