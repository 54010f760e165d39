"""Agents that choose experts: who chooses for a token, what an action is, and what collaboration is paid."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.domains import check_domains, place_of
from moebench.routing.router import RouterBuildContext, RouterConfig
from moebench.routing.values import LayerRecord, Routing


@dataclass(frozen=True, kw_only=True)
class AgentsConfig(RouterConfig):
    """Options of who chooses and for what reward."""

    agents: Literal["domain", "single"] = "domain"
    """One agent for each domain of the task (its dispatcher knows the domain), or a single one for all tokens. Domains
    that were held out of training have the mean of all agents."""
    pass_through: bool = False
    """One action more: no expert, the token goes on as it is, which the plan of a matched arm does not know."""
    collaboration: float = 0.0
    """Reward of choosing what others chose: times the share of tokens that the chosen expert had so far."""


def check_collaboration(config: Any) -> None:
    """Refuse a negative reward."""
    require(config.collaboration >= 0, "router.collaboration", config.collaboration, "at least 0")


def num_agents(config: Any, context: RouterBuildContext) -> int:
    """Return how many agents there are; raise UsageError where a task has no domains for them."""
    return check_domains(config.name, context) if config.agents == "domain" else 1


def agent_of(ctx: RouteContext, num_agents: int, x_TD: Tensor) -> Tensor:
    """Return the agent of each token, int64; `num_agents`, for which there is none, where its domain was held out."""
    if num_agents == 1 or ctx.domain_T is None:
        return torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
    return place_of(ctx.domain_T, num_agents)


def acted(action_T: Tensor, num_experts: int, num_actions: int, **tables: Any) -> Routing:
    """Return the routing of one action for each token: its expert with weight 1; the last action may be none."""
    weight_TK = torch.ones(len(action_T), 1, device=action_T.device)
    expert_TK = action_T.clamp(max=num_experts - 1).unsqueeze(-1)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts, **tables)
    if num_actions == num_experts:
        return routing
    return routing.keep(action_T < num_experts).compact()  # a hole would keep a place that rerouting may need


def collaboration(record: LayerRecord, share_E: Tensor, coefficient: float) -> Tensor:
    """Return the reward for choosing what many chose before; 0 for choosing no expert."""
    paid_A = coefficient * torch.cat([share_E, share_E.new_zeros(1)])
    return paid_A[record.routing.token_extras["action_T"]]
