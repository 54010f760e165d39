"""What routers by domain share: domains there must be, and what a token of one that was not trained on is given."""

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.router import RouterBuildContext


def check_domains(name: str, context: RouterBuildContext) -> int:
    """Return the number of domains; raise UsageError where the task has none."""
    if not context.data.num_domains:
        raise UsageError(f"router.name: '{name}' routes by domain, which this task does not have")
    return context.data.num_domains


def with_mean(value: Tensor, dim: int = 0) -> Tensor:
    """Return the values of each domain with their mean behind them, which is what a domain not trained on is given."""
    return torch.cat([value, value.mean(dim, keepdim=True)], dim)


def place_of(domain_T: Tensor, num_domains: int) -> Tensor:
    """Return the place of each token's domain in `with_mean`: the last is that of every domain not trained on."""
    return domain_T.clamp(max=num_domains)
