"""Conditional computation: every expert is switched on or off for every token by a coin that is learned."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.policy import PolicyConfig, PolicyRouter
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="reinforcement",
        equation="σ = sigmoid(W x + d),  u_e ~ Bernoulli(σ_e),  y = Σ_e u_e E_e(x),  loss -(R - b) log π(u)",
        paper="arXiv:1511.06297",
        use="The earliest conditional computation by a policy: tokens take any number of experts.",
        beware="The gradient is very noisy: the policy can switch everything off or on, and only its three "
        "losses hold it.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector and its own draws",
            batch_dependent=True,
            draws_in_evaluation=True,
        ),
        variable_k=True,
        trained_by_own_loss=("gate", "bias_E", "value"),
        own_losses=("sparsity_per_expert", "sparsity_per_token", "variance"),
    )
)
class ConditionalComputation(PolicyRouter):
    """Block dropout with a policy (Bengio et al. 2016): a token uses any number of experts, each with weight 1.

    With τ = average_experts / E: sparsity_per_expert is mean_e (mean_t σ_te / τ - 1)², sparsity_per_token is
    mean_t (mean_e σ_te / τ - 1)², both 0 on target, and variance is 1 - 4 mean_e Var_t σ_te, 1 where all tokens are
    treated alike. The paper takes distances from τ in place of relative squares, and minus the variance; it searches
    the coefficients for each data set, ours are smaller. Its blocks are slices of a layer; here they are experts, and d
    starts where σ = τ, so that training does not begin with half of all experts. The baseline is ours.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Options of conditional computation."""

        name: str = "conditional_computation"
        average_experts: int = 2
        """Experts per token on average (τ E), to which two of the losses push; matched arms count with it."""
        evaluation: Literal["draw", "likely"] = "draw"
        """In evaluation: draw as in training, or use the experts with σ over one half, which may be none."""
        entropy: float = 0.0
        losses: dict[str, float] = field(
            default_factory=lambda: {"sparsity_per_expert": 0.1, "sparsity_per_token": 0.1, "variance": 0.01}
        )

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.target = config.average_experts / context.num_experts
        self.gate = Gate(context.d_model, context.num_experts)
        self.bias_E = nn.Parameter(torch.empty(context.num_experts))

    def init_weights(self, generator: Generator) -> None:
        """Start at σ = τ."""
        nn.init.constant_(self.bias_E, math.log(self.target / (1 - self.target)))

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        """Return the average that the losses push to."""
        return int(config.average_experts)

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse an average outside 1 ... E - 1: of all experts nothing is conditional."""
        super().check(config, num_experts)
        average = config.average_experts
        check_top_k(average, num_experts, key="average_experts")
        require(average < num_experts, "router.average_experts", average, f"below layout.num_experts={num_experts}")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Toss the coin of every token and expert."""
        logits_TE = self.gate(x_TD) + self.bias_E.float()
        scores_TE = logits_TE.sigmoid()
        if ctx.training or self.options.evaluation == "draw":
            chosen_TE = ctx.uniform(*logits_TE.shape) < scores_TE.detach()
        else:
            chosen_TE = logits_TE.detach() > 0
        on_TE, off_TE = functional.logsigmoid(logits_TE), functional.logsigmoid(-logits_TE)
        log_policy_T = torch.where(chosen_TE, on_TE, off_TE).sum(-1)
        entropy_T = -(scores_TE * on_TE + (1 - scores_TE) * off_TE).sum(-1)
        extras = self.decided(x_TD, log_policy_T, entropy_T)
        return Routing.from_table(
            chosen_TE.float(), chosen_TE, logits_TE=logits_TE, scores_TE=scores_TE, token_extras=extras
        )

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return how far the use of experts is from the target, and how alike the policy treats all tokens."""
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        mean_E = record.mean(scores_TE)
        variance_E = (record.mean(scores_TE.square()) - mean_E.square()).clamp(min=0)
        return {
            "sparsity_per_expert": (mean_E / self.target - 1).square().mean(),
            "sparsity_per_token": record.mean((scores_TE.mean(-1) / self.target - 1).square()),
            "variance": 1 - 4 * variance_E.mean(),
        }
