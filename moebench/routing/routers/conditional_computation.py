"""Conditional computation: a learned Bernoulli policy switches each expert on or off for each token (arXiv:1511.06297).

Every expert has a probability to be used by a token; the set is sampled, and the output is the sum of the sampled
experts. The policy learns by REINFORCE, with losses that keep its sparsity on target.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

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
        use="When a learned policy should switch each expert on or off for each token, so that any number of experts "
        "is used.",
        beware="The gradient is very noisy: the policy can switch everything off or on, and only its three losses "
        "prevent this.",
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
    """Block dropout with a policy (Bengio et al. 2016): any number of experts per token, each with weight 1.

    With τ = average_experts / E, `sparsity_per_expert` is mean_e (mean_t σ_te / τ - 1)² and `sparsity_per_token` is
    mean_t (mean_e σ_te / τ - 1)², both 0 on target; `variance` is 1 - 4 mean_e Var_t σ_te, 1 if all tokens are treated
    alike. The paper uses absolute distances from τ in place of relative squares, and minus the variance; it tunes the
    coefficients for each data set, and ours are smaller. Its blocks are slices of a layer; here they are experts. The
    bias d starts where σ = τ, so that training does not start with half of all experts. The reward baseline is an
    addition.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(PolicyConfig):
        """Options of conditional computation."""

        name: str = "conditional_computation"
        average_experts: int = 2
        """Target number of experts per token (τ E), used by two of the losses and to match arms."""
        evaluation: Literal["draw", "likely"] = "draw"
        """In evaluation: sample as in training (draw), or use the experts with σ > 1/2, possibly none (likely)."""
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
        """Initialise the bias such that σ = τ."""
        nn.init.constant_(self.bias_E, math.log(self.target / (1 - self.target)))

    @classmethod
    @override
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        return int(config.average_experts)

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        super().check(config, num_experts)
        average = config.average_experts
        check_top_k(average, num_experts, key="average_experts")
        require(average < num_experts, "router.average_experts", average, f"below layout.num_experts={num_experts}")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD) + self.bias_E.float()
        scores_TE = logits_TE.sigmoid()
        if ctx.training or self.options.evaluation == "draw":
            chosen_TE = ctx.uniform(*logits_TE.shape) < scores_TE.detach()
        else:
            chosen_TE = logits_TE.detach() > 0
        on_TE, off_TE = functional.logsigmoid(logits_TE), functional.logsigmoid(-logits_TE)
        log_policy_T = torch.where(chosen_TE, on_TE, off_TE).sum(-1)
        entropy_T = -(scores_TE * on_TE + (1 - scores_TE) * off_TE).sum(-1)
        extras = self.build_extras(x_TD, log_policy_T, entropy_T)
        return Routing.from_table(
            chosen_TE.float(), chosen_TE, logits_TE=logits_TE, scores_TE=scores_TE, token_extras=extras
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        mean_E = record.mean(scores_TE)
        variance_E = (record.mean(scores_TE.square()) - mean_E.square()).clamp(min=0)
        return {
            "sparsity_per_expert": (mean_E / self.target - 1).square().mean(),
            "sparsity_per_token": record.mean((scores_TE.mean(-1) / self.target - 1).square()),
            "variance": 1 - 4 * variance_E.mean(),
        }
