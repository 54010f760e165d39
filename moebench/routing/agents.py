"""Agents of routing networks: which agent acts for a token, what its actions do, and the collaboration reward."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.domains import check_domains, get_domain_index
from moebench.routing.router import RouterBuildContext, RouterConfig
from moebench.routing.selection import select
from moebench.routing.values import LayerRecord, Routing


@dataclass(frozen=True, kw_only=True)
class AgentsConfig(RouterConfig):
    """Options of agents, their actions and their rewards."""

    agents: Literal["domain", "single"] = "domain"
    """One agent for each domain of the task, which must be known (domain), or one agent for all tokens (single). Tokens
    of domains held out of training use the mean of all agents."""
    pass_through: bool = False
    """Add an action that uses no expert: the token keeps its residual. Matched arms do not count the saved compute."""
    collaboration: float = 0.0
    """Coefficient of the reward for choosing popular experts: times the chosen expert's running share of tokens."""


def check_collaboration(config: Any) -> None:
    """Raise UsageError for a negative coefficient of the collaboration reward."""
    require(config.collaboration >= 0, "router.collaboration", config.collaboration, "at least 0")


def count_agents(config: Any, context: RouterBuildContext) -> int:
    """Return the number of agents; raise UsageError where agents need domains that the task does not have."""
    return check_domains(config.name, context) if config.agents == "domain" else 1


def assign_agents(ctx: RouteContext, num_agents: int, x_TD: Tensor) -> Tensor:
    """Return the agent of each token, int64; index `num_agents` (their mean) for domains held out of training."""
    if num_agents == 1 or ctx.domain_T is None:
        return torch.zeros(x_TD.shape[0], dtype=torch.int64, device=x_TD.device)
    return get_domain_index(ctx.domain_T, num_agents)


def route_actions(action_T: Tensor, num_experts: int, num_actions: int, **tables: Any) -> Routing:
    """Return the routing of one action per token: its expert with weight 1; an action of E or more uses no expert."""
    weight_TK = torch.ones(len(action_T), 1, device=action_T.device)
    expert_TK = action_T.clamp(max=num_experts - 1).unsqueeze(-1)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=num_experts, **tables)
    if num_actions == num_experts:
        return routing
    return select(routing, action_T < num_experts)


def compute_collaboration_reward(record: LayerRecord, share_E: Tensor, coefficient: float) -> Tensor:
    """Return `coefficient` times the running share of each token's expert; 0 where it used no expert."""
    reward_A = coefficient * torch.cat([share_E, share_E.new_zeros(1)])
    return reward_A[record.routing.token_extras["action_T"]]
