"""REINFORCE: the expert is drawn from the router's probabilities, and good draws are made more likely."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.policy import PolicyConfig, PolicyRouter, certainty, drawn
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="π = softmax(W x),  i ~ π,  y = E_i(x),  loss -(R - b) log π_i - β H(π),  R = -loss of the token",
        paper="arXiv:2202.01169, RL-R; learned baseline: arXiv:2306.03745",
        use="Learning which expert to use from rewards alone: what the gradient through the weights is worth.",
        beware="The gradient is noisy, and noisier with more experts; it can settle on one expert. A choice is "
        "not credited for what it does to later tokens.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
        trained_by_own_loss=("gate", "value"),
    )
)
class Reinforce(PolicyRouter):
    """Routing by reinforcement learning (RL-R of Clark et al. 2022): the one expert's output has weight 1.

    The probability does not scale the output, so the task loss reaches the router through rewards alone. Evaluation
    takes the most likely expert. The policy gradient has the scale of the task loss; published code that learns its
    baseline, for adapters chosen by whole sequences (SMEAR, Muqeeth et al. 2023), uses 0.01 of it, and subtracts the
    entropy where most add it: here the sign is that of exploration.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Options of REINFORCE."""

        name: str = "reinforce"
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Draw an expert for each token, or in evaluation take the most likely one."""
        logits_TE = self.gate(x_TD)
        action_T = drawn(logits_TE, ctx)
        log_policy_T, entropy_T = certainty(logits_TE, action_T)
        return Routing.from_top_k(
            action_T.unsqueeze(-1),
            torch.ones(len(action_T), 1, device=x_TD.device),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=logits_TE.softmax(-1),
            token_extras=self.decided(x_TD, log_policy_T, entropy_T),
        )
