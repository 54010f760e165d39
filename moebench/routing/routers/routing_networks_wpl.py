"""Routing networks as their authors prefer them: a table of probabilities for each agent, moved by WPL."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.agents import AgentsConfig, acted, agent_of, check_collaboration, collaboration, num_agents
from moebench.routing.context import RouteContext
from moebench.routing.domains import with_mean
from moebench.routing.policy import drawn, follow
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterTraits
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="a ~ π_g,  y = E_a(x) or 0,  π_g ← simplex(π_g + λ Δ_a (π_a if Δ_a < 0 else 1 - π_a)),  Δ_a = R_a - R̄",
        paper="arXiv:1711.01239",
        use="Multi-agent learning that is known to settle: a table of choices for each domain.",
        beware="Blind to the token. A domain settles on one expert, however many there are.",
        causality=Causality(
            causal=True, reason="the choice is a draw from a table that only past steps have set", batch_dependent=False
        ),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class RoutingNetworksWPL(Router["RoutingNetworksWPL.Config"]):
    """Routing networks (Rosenbaum et al. 2017) with the weighted policy learner (Abdallah and Lesser 2008).

    The policy of an agent is a table, blind to the token: a domain's tokens all go the same way once it has settled.
    WPL slows down towards the borders of the simplex, which keeps agents that learn at once from circling around each
    other. Here a step moves the table once, by the mean over its tokens of what they would each do: every token weighs
    its own advantage by its sign, as in the paper. R̄ is the mean of the steps before: in the first step nothing moves.
    What differs from the paper else stands at `routing_networks`. Evaluation takes the most likely action.
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
        """How far a reward that is 1 nat over the average moves a probability in a step (λ), before the weights."""
        decay: float = 0.99
        """How much of the running means a step keeps; the first steps are averaged evenly."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_agents = num_agents(config, context)
        self.num_actions = context.num_experts + config.pass_through
        even_GA = torch.full((self.num_agents, self.num_actions), 1 / self.num_actions)
        self.register_buffer("policy_GA", even_GA)
        self.register_buffer("mean_G", torch.zeros(self.num_agents))
        self.register_buffer("num_steps_G", torch.zeros(self.num_agents, dtype=torch.int64))
        self.register_buffer("share_E", torch.zeros(context.num_experts))
        self.register_buffer("num_counted", torch.zeros((), dtype=torch.int64))

    @property
    @override
    def traits(self) -> RouterTraits:
        # The action to pass through uses no expert.
        return replace(super().traits, has_variable_k=self.num_actions > self.num_experts)

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse rates out of range."""
        check_collaboration(config)
        require(config.rate >= 0, "router.rate", config.rate, "at least 0")
        require(0 <= config.decay < 1, "router.decay", config.decay, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Draw the action of each token from its agent's table, or in evaluation take the most likely one."""
        agent_T = agent_of(ctx, self.num_agents, x_TD)
        action_T = drawn(with_mean(self.policy_GA).log()[agent_T], ctx)
        extras = {"action_T": action_T, "agent_T": agent_T}
        return acted(action_T, self.num_experts, self.num_actions, token_extras=extras)

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return each agent's rewards and how many, and its advantages above and below 0 by action."""
        assert record.token_loss_T is not None, "the record has not been judged"
        action_T, agent_T = record.routing.token_extras["action_T"], record.routing.token_extras["agent_T"]
        reward_T = (collaboration(record, self.share_E, self.config.collaboration) - record.token_loss_T).double()
        valid_T = torch.ones_like(reward_T) if record.valid_T is None else record.valid_T.double()
        has_mean_T = (self.num_steps_G > 0)[agent_T]
        better_T = (reward_T - self.mean_G[agent_T]) * valid_T * has_mean_T
        zeros_GA = reward_T.new_zeros(self.policy_GA.shape)
        return {
            "reward": zeros_GA[:, 0].index_add(0, agent_T, reward_T * valid_T),
            "taken": zeros_GA[:, 0].index_add(0, agent_T, valid_T),
            "above": zeros_GA.index_put((agent_T, action_T), better_T.clamp(min=0), accumulate=True),
            "below": zeros_GA.index_put((agent_T, action_T), better_T.clamp(max=0), accumulate=True),
        }

    @torch.no_grad()
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Move the tables by the mean of what each token would do, and then the means of the rewards."""
        moved_GA = (1 - self.policy_GA) * statistics["above"] + self.policy_GA * statistics["below"]
        moved_GA = moved_GA / statistics["taken"].clamp(min=1).unsqueeze(-1)
        self.policy_GA.copy_(onto_simplex(self.policy_GA + self.config.rate * moved_GA))
        follow(self.mean_G, statistics["reward"], statistics["taken"], self.num_steps_G, self.config.decay)
        follow(self.share_E, load_E, load_E.sum(), self.num_counted, self.config.decay)


def onto_simplex(value_GA: Tensor) -> Tensor:
    """Return the nearest probabilities to each row: max(v - θ, 0) with the θ that makes them sum to 1."""
    sorted_GA = value_GA.sort(dim=-1, descending=True).values
    rank_A = torch.arange(1, value_GA.shape[-1] + 1, device=value_GA.device)
    theta_GA = (sorted_GA.cumsum(-1) - 1) / rank_A
    last_G1 = (sorted_GA > theta_GA).sum(-1, keepdim=True) - 1  # as many as stay above 0
    return (value_GA - theta_GA.gather(-1, last_G1)).clamp(min=0)
