"""Sigma-MoE: a sigmoid for each expert, so that experts do not compete for the weight."""

from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

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
        use="Experts that do not compete: each score stands for itself, at any number of experts.",
        beware="Weights are not normalised, so the output grows with k. Without the entropy loss or dropped "
        "experts few of them are used.",
        causality=Causality(
            causal=True, reason="each token is routed by its own vector and its own draw", batch_dependent=False
        ),
    )
)
class SigmaMoE(Router["SigmaMoE.Config"]):
    """Top-k of sigmoids without normalisation (Csordás, Irie and Schmidhuber 2023).

    Leaving experts out of the choice at random (δ) and a loss on the entropy of the mean choice keep all of them in
    use. The loss is the paper's up to a constant, so that it is 0 at uniform. Rows of the gate start at one length.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of sigma-MoE."""

        name: str = "sigma_moe"
        top_k: int = 4
        """Experts per token."""
        left_out: float = 0.05
        """Share of the scores that are set to 0 in training, each token and expert on its own (δ)."""
        losses: dict[str, float] = field(default_factory=lambda: {"global_entropy": 0.001})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.left_out = config.left_out
        self.gate = EqualRows(context.d_model, context.num_experts, init_scale=1.0)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and a share that leaves nothing."""
        check_top_k(config.top_k, num_experts)
        require(0 <= config.left_out < 1, "router.left_out", config.left_out, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the k experts with the highest scores."""
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


class EqualRows(Gate):
    """A gate whose rows start at one length: no expert is preferred by its row's size."""

    def init_weights(self, generator: Generator) -> None:
        """Draw the weights, then give all rows their root mean square length."""
        super().init_weights(generator)
        with torch.no_grad():
            length_E1 = self.weight_ED.norm(dim=-1, keepdim=True)
            self.weight_ED.mul_(length_E1.square().mean().sqrt() / length_E1)
