"""Domains in routers: the check that a task has them, their numbers, and values for domains not trained on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from moebench.errors import UsageError, build_unknown_error
from moebench.routing.context import DataSummary
from moebench.routing.router import RouterBuildContext


def check_domains(name: str, context: RouterBuildContext) -> int:
    """Return the number of domains; raise UsageError where the task has none."""
    if not context.data.num_domains:
        raise UsageError(f"router.name: '{name}' routes by domain, which this task does not have")
    return context.data.num_domains


def number_domains(listed: Sequence[str], data: DataSummary) -> list[int]:
    """Return the number of each domain of the data: its index in `listed`, and len(listed) for one that is not there.

    With an empty list these are the indices of the data. Raises UsageError for a name that the data lack or that is
    listed twice, and for a domain of training that is not listed.
    """
    if not listed:
        return list(range(len(data.domains)))
    for name in listed:
        if name not in data.domains:
            raise build_unknown_error("router.domains", name, data.domains)
    if len(set(listed)) != len(listed):
        raise UsageError(f"router.domains: {list(listed)} names a domain twice")
    missing = [name for name in data.domains[: data.num_domains] if name not in listed]
    if missing:
        raise UsageError(f"router.domains: lacks {', '.join(missing)}, which training has (task.data.held_out_domains)")
    return [listed.index(name) if name in listed else len(listed) for name in data.domains]


def append_mean(value: Tensor, dim: int = 0) -> Tensor:
    """Append the mean over domains, which is the value for domains that were not trained on."""
    return torch.cat([value, value.mean(dim, keepdim=True)], dim)


def get_domain_index(domain_T: Tensor, num_domains: int) -> Tensor:
    """Return the index of each token's domain into `append_mean`: the last one for every domain not trained on."""
    return domain_T.clamp(max=num_domains)
