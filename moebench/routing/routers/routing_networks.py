"""Routing networks: agents, one for each domain, choose blocks for their tokens and learn from rewards."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.agents import AgentsConfig, acted, agent_of, check_collaboration, collaboration, num_agents
from moebench.routing.context import RouteContext
from moebench.routing.domains import with_mean
from moebench.routing.gate import Gate
from moebench.routing.policy import PolicyConfig, PolicyRouter, certainty, drawn, follow
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterTraits
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="π = softmax(W_g x),  g the domain,  a ~ π,  y = E_a(x) or 0,  loss -(R - b) log π_a - β H(π)",
        paper="arXiv:1711.01239",
        use="Agents for each domain that learn from rewards, as in multi-task learning.",
        beware="Noisy, as all policy gradients. With one domain there is one agent; the collaboration reward "
        "can end at one expert.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector, its domain and its own draw",
            batch_dependent=False,
        ),
        trained_by_own_loss=("gate", "value"),
    )
)
class RoutingNetworks(PolicyRouter):
    """Routing networks (Rosenbaum et al. 2017) in one layer, their agents learning by REINFORCE.

    In the paper one image takes one path through all depths, and the reward comes at its end: +1 or -1 for the class.
    Here every token takes its own path, each layer has its own agents, and the reward is the token's log-likelihood.
    The paper pays the collaboration reward by the average probability of a choice, here by its running share. As in
    the authors' code the agents read their input and do not shape it, unless `detach_input` is off.
    """

    share_E: Tensor
    num_counted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig, AgentsConfig):
        """Options of routing networks."""

        name: str = "routing_networks"
        detach_input: bool = True
        """Keep the gradient of the policy from the network below."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_agents = num_agents(config, context)
        self.num_actions = context.num_experts + config.pass_through
        self.gate = Gate(context.d_model, self.num_agents * self.num_actions)
        self.register_buffer("share_E", torch.zeros(context.num_experts))
        self.register_buffer("num_counted", torch.zeros((), dtype=torch.int64))

    @property
    @override
    def traits(self) -> RouterTraits:
        # The action to pass through uses no expert.
        return replace(super().traits, has_variable_k=self.num_actions > self.num_experts)

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse coefficients out of range."""
        super().check(config, num_experts)
        check_collaboration(config)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Let the agent of each token's domain draw its expert, or in evaluation take the most likely one."""
        read_TD = x_TD.detach() if self.config.detach_input else x_TD
        all_TGA = self.gate(read_TD).view(-1, self.num_agents, self.num_actions)
        agent_T = agent_of(ctx, self.num_agents, x_TD)
        all_TGA = all_TGA if ctx.training else with_mean(all_TGA, dim=1)
        logits_TA = all_TGA[torch.arange(len(agent_T), device=x_TD.device), agent_T]
        action_T = drawn(logits_TA, ctx)
        extras = self.decided(x_TD, *certainty(logits_TA, action_T)) | {"action_T": action_T}
        scores_TA = logits_TA.softmax(-1)
        return acted(
            action_T,
            self.num_experts,
            self.num_actions,
            logits_TE=logits_TA[:, : self.num_experts],
            scores_TE=scores_TA[:, : self.num_experts],
            token_extras=extras,
        )

    def reward(self, record: LayerRecord) -> Tensor:
        """Return the log-likelihood plus what collaboration is paid."""
        return super().reward(record) + collaboration(record, self.share_E, self.config.collaboration)

    @torch.no_grad()
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Move the running mean of rewards and the share of each expert."""
        super().after_step(load_E, statistics)
        follow(self.share_E, load_E, load_E.sum(), self.num_counted, self.options.decay)
