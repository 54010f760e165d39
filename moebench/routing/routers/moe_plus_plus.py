"""MoE++: top-k over networks and experts without one, with gates that see the choice of the layer below."""

from dataclasses import dataclass, field

from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="G_j = W x + W_g G_{j-1} in the j-th MoE layer,  p = softmax(G_j),  y = Σ_{i in top-k} p_i E_i(x)",
        paper="arXiv:2410.07348, section 3 (loss: heterogeneous load balance)",
        use="Experts that cost nothing beside networks: easy tokens use less compute.",
        beware="Says nothing without layout `zero_computation`. Executed FLOPs vary with the routing.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vectors, here and in the layers below",
            batch_dependent=False,
        ),
        own_losses=("heterogeneous_balance",),
    )
)
class MoEPlusPlus(Router["MoEPlusPlus.Config"]):
    """MoE++ (Jin et al. 2024), for layout `zero_computation`: a token uses fewer networks the more free experts it has.

    The loss weighs each expert, η = 1 with a network and τ without: E² / Σ η · Σ_i η_i f_i P_i, 1 at uniform routing,
    least where the load goes as 1/η. The paper counts f per token and leaves the factor out: its value is k Σ η / E² of
    ours. Where all experts have networks it is the load-balance loss. Gradients reach the gates of the layers below.
    Planned FLOPs are those of an even load over all experts; a run reports what it executed. Weights are the
    paper's equations, not its code (which sets those of zero experts to 0 and renormalises); the larger capacity of
    networks is left out. Where the layer below has another number of experts, the residual starts anew.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of MoE++."""

        name: str = "moe_plus_plus"
        top_k: int = 2
        """Experts per token, with a network or without."""
        tau: float = 0.75
        """Weight τ of experts without a network in the loss: the lower, the more tokens go there."""
        losses: dict[str, float] = field(default_factory=lambda: {"heterogeneous_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.eta = [config.tau if free else 1.0 for free in context.free_E or (False,) * context.num_experts]
        self.gate = Gate(context.d_model, context.num_experts)
        self.residual = Gate(context.num_experts, context.num_experts) if context.layer > 0 else None

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and a weight outside 0 ... 1."""
        check_top_k(config.top_k, num_experts)
        require(0 < config.tau <= 1, "router.tau", config.tau, "greater than 0 and at most 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Choose among all experts, with what the layer below preferred."""
        logits_TE = self.gate(x_TD)
        if self.residual is not None:
            below_TE = ctx.previous_logits_TE
            fits = below_TE is not None and below_TE.shape == logits_TE.shape
            logits_TE = logits_TE + self.residual(below_TE if fits else logits_TE.new_zeros(logits_TE.shape))
        scores_TE = logits_TE.softmax(-1)
        expert_TK = rank_top_k(logits_TE, self.top_k)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the load-balance loss with a weight for each expert."""
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        eta_E = scores_TE.new_tensor(self.eta)
        load_E = record.load_E.to(scores_TE.dtype)
        share_E = load_E / load_E.sum().clamp(min=1)
        weighed = (eta_E * share_E * record.mean(scores_TE)).sum()
        return {"heterogeneous_balance": self.num_experts**2 / eta_E.sum() * weighed}
