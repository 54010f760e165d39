"""REINFORCE: the expert is sampled from the router's softmax and learned from the token's reward (arXiv:2202.01169).

The sampled expert has weight 1. The reward is the log-likelihood of the token's prediction; the policy gradient, with a
baseline and an entropy bonus, is the only gradient that reaches the gate.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.policy import PolicyConfig, PolicyRouter, log_prob_and_entropy, sample_actions
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="π = softmax(W x),  i ~ π,  y = E_i(x),  loss -(R - b) log π_i - β H(π),  R = -loss of the token",
        paper="arXiv:2202.01169, RL-R; learned baseline: arXiv:2306.03745",
        use="To learn the choice of expert from rewards alone: the difference to `switch` shows what the gradient "
        "through the weights is worth.",
        beware="The gradient is noisy, more so with more experts, and can converge to one expert. A choice is not "
        "credited for its effect on later tokens.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
        trained_by_own_loss=("gate", "value"),
    )
)
class Reinforce(PolicyRouter):
    """Routing by reinforcement learning (RL-R of Clark et al. 2022): the sampled expert has weight 1.

    The probability does not scale the output, so the task loss reaches the router through rewards only. Evaluation
    takes the most likely expert. The policy gradient has the scale of the task loss. The released code of SMEAR
    (Muqeeth et al. 2023), which learns its baseline for adapters chosen by whole sequences, uses 0.01 of it and
    subtracts the entropy; here the entropy is added, which encourages exploration.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Options of REINFORCE."""

        name: str = "reinforce"
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        action_T = sample_actions(logits_TE, ctx)
        log_policy_T, entropy_T = log_prob_and_entropy(logits_TE, action_T)
        return Routing.from_top_k(
            action_T.unsqueeze(-1),
            torch.ones(len(action_T), 1, device=x_TD.device),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=logits_TE.softmax(-1),
            token_extras=self.build_extras(x_TD, log_policy_T, entropy_T),
        )
