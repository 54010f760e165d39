"""Routing networks with the weighted policy learner (WPL): one table of action probabilities per agent.

Paper: arXiv:1711.01239. The policy of an agent does not depend on the token. After each step WPL moves the
probabilities of the actions by their advantages, slower near the borders of the simplex.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.agents import (
    AgentsConfig,
    assign_agents,
    check_collaboration,
    compute_collaboration_reward,
    count_agents,
    route_actions,
)
from moebench.routing.context import RouteContext
from moebench.routing.domains import append_mean
from moebench.routing.policy import sample_actions, update_running_mean_
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterTraits
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="a ~ π_g,  y = E_a(x) or 0,  π_g ← simplex(π_g + λ Δ_a (π_a if Δ_a < 0 else 1 - π_a)),  Δ_a = R_a - R̄",
        paper="arXiv:1711.01239",
        use="For multi-agent learning that is known to converge: each domain has a table of choices.",
        beware="Routing does not depend on the token. A domain converges to one expert, however many there are.",
        causality=Causality(
            causal=True, reason="the action is drawn from a table that only past steps have set", batch_dependent=False
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class RoutingNetworksWPL(Router["RoutingNetworksWPL.Config"]):
    """Routing networks (Rosenbaum et al. 2017) with the weighted policy learner (Abdallah and Lesser 2008).

    The policy of an agent is a table: once it has converged, all tokens of a domain take the same action. WPL slows
    down near the borders of the simplex, which keeps agents that learn simultaneously from cycling. Here a step updates
    the table once, by the mean of its tokens' individual updates; each token weights its own advantage by its sign, as
    in the paper. R̄ is the running mean of the rewards of earlier steps: the first step changes nothing. Other
    differences from the paper are those of `routing_networks`. Evaluation takes the most likely action.
    """

    policy_GA: Tensor
    mean_G: Tensor
    num_steps_G: Tensor
    share_E: Tensor
    num_counted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(AgentsConfig):
        """Options of routing networks with WPL."""

        name: str = "routing_networks_wpl"
        rate: float = 0.3
        """Learning rate λ: change of a probability per step for an advantage of 1 nat, before WPL's weights."""
        decay: float = 0.99
        """Decay of the running means per step; the first steps are averaged evenly."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_agents = count_agents(config, context)
        self.num_actions = context.num_experts + config.pass_through
        uniform_GA = torch.full((self.num_agents, self.num_actions), 1 / self.num_actions)
        self.register_buffer("policy_GA", uniform_GA)
        self.register_buffer("mean_G", torch.zeros(self.num_agents))
        self.register_buffer("num_steps_G", torch.zeros(self.num_agents, dtype=torch.int64))
        self.register_buffer("share_E", torch.zeros(context.num_experts))
        self.register_buffer("num_counted", torch.zeros((), dtype=torch.int64))

    @property
    @override
    def traits(self) -> RouterTraits:
        return replace(super().traits, has_variable_k=self.num_actions > self.num_experts)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_collaboration(config)
        require(config.rate >= 0, "router.rate", config.rate, "at least 0")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        agent_T = assign_agents(ctx, self.num_agents, x_TD)
        action_T = sample_actions(append_mean(self.policy_GA).log()[agent_T], ctx)
        extras = {"action_T": action_T, "agent_T": agent_T}
        return route_actions(action_T, self.num_experts, self.num_actions, token_extras=extras)

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        assert record.token_loss_T is not None, "the record has no task loss yet"
        action_T, agent_T = record.routing.token_extras["action_T"], record.routing.token_extras["agent_T"]
        reward_T = (
            compute_collaboration_reward(record, self.share_E, self.config.collaboration) - record.token_loss_T
        ).double()
        valid_T = torch.ones_like(reward_T) if record.valid_T is None else record.valid_T.double()
        has_mean_T = (self.num_steps_G > 0)[agent_T]
        advantage_T = (reward_T - self.mean_G[agent_T]) * valid_T * has_mean_T
        zeros_GA = reward_T.new_zeros(self.policy_GA.shape)
        return {
            "reward": zeros_GA[:, 0].index_add(0, agent_T, reward_T * valid_T),
            "taken": zeros_GA[:, 0].index_add(0, agent_T, valid_T),
            "above": zeros_GA.index_put((agent_T, action_T), advantage_T.clamp(min=0), accumulate=True),
            "below": zeros_GA.index_put((agent_T, action_T), advantage_T.clamp(max=0), accumulate=True),
        }

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        update_GA = (1 - self.policy_GA) * statistics["above"] + self.policy_GA * statistics["below"]
        update_GA = update_GA / statistics["taken"].clamp(min=1).unsqueeze(-1)
        self.policy_GA.copy_(project_to_simplex(self.policy_GA + self.config.rate * update_GA))
        update_running_mean_(
            self.mean_G, statistics["reward"], statistics["taken"], self.num_steps_G, self.config.decay
        )
        update_running_mean_(self.share_E, load_E, load_E.sum(), self.num_counted, self.config.decay)


def project_to_simplex(value_GA: Tensor) -> Tensor:
    """Project each row to the probability simplex: max(v - θ, 0) with the θ that makes it sum to 1."""
    sorted_GA = value_GA.sort(dim=-1, descending=True).values
    rank_A = torch.arange(1, value_GA.shape[-1] + 1, device=value_GA.device)
    theta_GA = (sorted_GA.cumsum(-1) - 1) / rank_A
    last_index_G1 = (sorted_GA > theta_GA).sum(-1, keepdim=True) - 1  # number of positive entries, less 1
    return (value_GA - theta_GA.gather(-1, last_index_G1)).clamp(min=0)
