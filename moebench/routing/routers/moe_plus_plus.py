"""MoE++: top-k over experts with and without a network; gates also read the logits of the layer below."""

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.constants import build_constant_like
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature
from moebench.routing.features.networkless_experts import NetworklessExperts
from moebench.routing.features.previous_logits import PreviousLogits
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="G_j = W x + W_g G_{j-1} in the j-th MoE layer,  p = softmax(G_j),  y = Σ_{i in top-k} p_i E_i(x)",
        paper="arXiv:2410.07348, section 3 (loss: heterogeneous load balance)",
        use="With experts that cost nothing beside networks: easy tokens use less compute.",
        beware="It is pointless without the layout `zero_computation`. Executed FLOPs vary with the routing.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vectors, here and in the layers below",
            batch_dependent=False,
        ),
        own_losses=("heterogeneous_balance",),
    )
)
class MoEPlusPlus(Router["MoEPlusPlus.Config"]):
    """MoE++ (Jin et al. 2024), for layout `zero_computation`: a token that chooses free experts uses fewer networks.

    The loss weighs each expert, η = 1 with a network and τ without: E² / Σ η · Σ_i η_i f_i P_i, 1 at uniform routing,
    minimal where the load is proportional to 1/η. The paper counts f per token and omits the factor: its value is k Σ η
    / E² of ours. If all experts have networks it is the load-balance loss. Gradients reach the gates of the layers
    below. Planned FLOPs assume an even load over all experts; a run reports what it executed. Weights follow the
    paper's equations, not its code (which sets those of zero experts to 0 and renormalises); the larger capacity of
    networks is not implemented. If the layer below has another number of experts, its logits are not used.
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
        is_networkless_E = context.features.get(NetworklessExperts, (False,) * context.num_experts)
        self.eta = [config.tau if free else 1.0 for free in is_networkless_E]
        self.gate = Gate(context.d_model, context.num_experts)
        self.residual = Gate(context.num_experts, context.num_experts) if context.layer > 0 else None

    @classmethod
    @override
    def required_features(cls, config: Config) -> tuple[Feature, ...]:
        return PreviousLogits(), NetworklessExperts()

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(0 < config.tau <= 1, "router.tau", config.tau, "greater than 0 and at most 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        if self.residual is not None:
            below_TE = ctx.features.get(PreviousLogits)
            fits = below_TE is not None and below_TE.shape == logits_TE.shape
            logits_TE = logits_TE + self.residual(below_TE if fits else logits_TE.new_zeros(logits_TE.shape))
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=self.top_k))
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        scores_TE = record.routing.scores_TE
        assert scores_TE is not None
        eta_E = build_constant_like(self.eta, scores_TE)

        def formula(load_E: Tensor, mean_E: Tensor) -> Tensor:
            weighted = (eta_E * (load_E / load_E.sum().clamp(min=1)) * mean_E).sum()
            return self.num_experts**2 / eta_E.sum() * weighted

        load_E = record.routing.load_E.to(scores_TE.dtype)
        return {"heterogeneous_balance": reduce_record(record, formula, totals=[load_E], means=[scores_TE])}
