"""Routing networks: one agent per domain chooses experts for its tokens and learns by REINFORCE (arXiv:1711.01239).

Each agent is a linear policy over the experts, and optionally an action that uses none. The sampled expert has weight
1; the reward is the token's log-likelihood, plus a bonus for experts that are chosen often.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

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
from moebench.routing.gate import Gate
from moebench.routing.policy import (
    PolicyConfig,
    PolicyRouter,
    log_prob_and_entropy,
    sample_actions,
    update_running_mean_,
)
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterTraits
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="π = softmax(W_g x),  g the domain,  a ~ π,  y = E_a(x) or 0,  loss -(R - b) log π_a - β H(π)",
        paper="arXiv:1711.01239",
        use="For multi-task learning with one agent per domain that learns from rewards.",
        beware="It is noisy, as all policy gradients are. With one domain there is one agent; the collaboration "
        "reward can lead to a single expert.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector, its domain and its own draw",
            batch_dependent=False,
        ),
        trained_by_own_loss=("gate", "value"),
    )
)
class RoutingNetworks(PolicyRouter):
    """Routing networks (Rosenbaum et al. 2017) in one layer, with agents trained by REINFORCE.

    In the paper an image takes one path through all depths and gets one reward at the end, +1 or -1 for its class. Here
    every token takes its own path, each layer has its own agents, and the reward is the token's log-likelihood. The
    paper computes the collaboration reward from the average probability of a choice, here from its running share. As in
    the authors' code no gradient of the policy reaches the network below, unless `detach_input` is off.
    """

    share_E: Tensor
    num_counted: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig, AgentsConfig):
        """Options of routing networks."""

        name: str = "routing_networks"
        detach_input: bool = True
        """Stop the gradient of the policy at the router's input."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_agents = count_agents(config, context)
        self.num_actions = context.num_experts + config.pass_through
        self.gate = Gate(context.d_model, self.num_agents * self.num_actions)
        self.register_buffer("share_E", torch.zeros(context.num_experts))
        self.register_buffer("num_counted", torch.zeros((), dtype=torch.int64))

    @property
    @override
    def traits(self) -> RouterTraits:
        return replace(super().traits, has_variable_k=self.num_actions > self.num_experts)

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        super().check(config, num_experts)
        check_collaboration(config)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        input_TD = x_TD.detach() if self.config.detach_input else x_TD
        logits_TGA = self.gate(input_TD).view(-1, self.num_agents, self.num_actions)
        agent_T = assign_agents(ctx, self.num_agents, x_TD)
        logits_TGA = logits_TGA if ctx.training else append_mean(logits_TGA, dim=1)
        logits_TA = logits_TGA[torch.arange(len(agent_T), device=x_TD.device), agent_T]
        action_T = sample_actions(logits_TA, ctx)
        extras = self.build_extras(x_TD, *log_prob_and_entropy(logits_TA, action_T)) | {"action_T": action_T}
        scores_TA = logits_TA.softmax(-1)
        return route_actions(
            action_T,
            self.num_experts,
            self.num_actions,
            logits_TE=logits_TA[:, : self.num_experts],
            scores_TE=scores_TA[:, : self.num_experts],
            token_extras=extras,
        )

    @override
    def reward(self, record: LayerRecord) -> Tensor:
        return super().reward(record) + compute_collaboration_reward(record, self.share_E, self.config.collaboration)

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        super().after_step(load_E, statistics)
        update_running_mean_(self.share_E, load_E, load_E.sum(), self.num_counted, self.options.decay)
