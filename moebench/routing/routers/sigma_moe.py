"""Sigma-MoE: top-k of sigmoid scores, so that experts do not compete for the weight (arXiv:2310.10837).

Each expert scores a token with its own sigmoid; the k highest scores select the experts and are the weights.
Dropping experts at random in training and an entropy loss keep all of them in use.
"""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x) · m,  m ~ Bernoulli(1 - δ) in training,  w = s_top-k,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2310.10837, section 5",
        use="When experts should not compete: each score is independent, for any number of experts.",
        beware="Weights are not normalised, so the output grows with k. Without the entropy loss or expert dropout few "
        "experts are used.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
    )
)
class SigmaMoE(Router["SigmaMoE.Config"]):
    """Top-k of sigmoids without normalisation (Csordás, Irie and Schmidhuber 2023).

    Expert dropout (δ) and a loss on the entropy of the mean softmax of the logits keep all experts in use. The loss is
    the paper's plus a constant that makes it 0 at uniform routing. All rows of the gate start with the same length.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of sigma-MoE."""

        name: str = "sigma_moe"
        top_k: int = 4
        """Experts per token."""
        left_out: float = 0.05
        """Expert dropout δ: probability that a score is set to 0 in training, for each token and expert."""
        losses: dict[str, float] = field(default_factory=lambda: {"global_entropy": 0.001})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.left_out = config.left_out
        self.gate = EqualRowGate(context.d_model, context.num_experts, init_scale=1.0)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(0 <= config.left_out < 1, "router.left_out", config.left_out, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE, ranked_TE = logits_TE.sigmoid(), logits_TE
        if ctx.training and self.left_out > 0:
            kept_TE = ctx.uniform(*logits_TE.shape) >= self.left_out
            scores_TE, ranked_TE = scores_TE * kept_TE.float(), ranked_TE.masked_fill(~kept_TE, -torch.inf)
        expert_TK = rank_top_k(ranked_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )


class EqualRowGate(Gate):
    """A gate whose rows are initialised to equal length, so that no expert is preferred by the length of its row."""

    @override
    def init_weights(self, generator: Generator) -> None:
        super().init_weights(generator)
        with torch.no_grad():
            length_E1 = self.weight_ED.norm(dim=-1, keepdim=True)
            self.weight_ED.mul_(length_E1.square().mean().sqrt() / length_E1)
