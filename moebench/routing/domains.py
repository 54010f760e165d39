"""Domains in routers: the check that a task has them, and values for domains that were not trained on."""

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.router import RouterBuildContext


def check_domains(name: str, context: RouterBuildContext) -> int:
    """Return the number of domains; raise UsageError where the task has none."""
    if not context.data.num_domains:
        raise UsageError(f"router.name: '{name}' routes by domain, which this task does not have")
    return context.data.num_domains


def append_mean(value: Tensor, dim: int = 0) -> Tensor:
    """Append the mean over domains, which is the value for domains that were not trained on."""
    return torch.cat([value, value.mean(dim, keepdim=True)], dim)


def get_domain_index(domain_T: Tensor, num_domains: int) -> Tensor:
    """Return the index of each token's domain into `append_mean`: the last one for every domain not trained on."""
    return domain_T.clamp(max=num_domains)
