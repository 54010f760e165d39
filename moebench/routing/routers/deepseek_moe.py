"""DeepSeekMoE: top-k of many fine-grained experts with raw softmax weights (arXiv:2401.06066, 2405.04434).

A softmax over all experts gives probabilities; the token goes to the k most probable experts, in DeepSeek-V2 only among
its best groups of experts, weighted by the probabilities without renormalisation, times a constant.
"""

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.group_limit import check_kept_groups, limit_to_groups
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  w = scale · p_top-k,  y = Σ_i w_i E_i(x)  (+ shared experts)",
        paper="arXiv:2401.06066, eq. 9-11; groups: arXiv:2405.04434, section 2.2.2",
        use="With many narrow experts beside a shared one: combine it with the layout `fine_grained`.",
        beware="Weights sum to less than 1 and shrink with the number of experts, so the output depends on `scale`. "
        "It collapses without its balance loss, as any softmax top-k does.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class DeepSeekMoE(Router["DeepSeekMoE.Config"]):
    """Token choice for fine-grained experts beside shared ones (Dai et al. 2024, DeepSeek-AI 2024).

    The layout `fine_grained` provides the fine-grained and the shared experts; the router is a softmax over all experts
    whose k highest values are the weights. DeepSeek-V2 adds group-limited selection and the scale: 160 experts with
    `top_k=6 num_groups=8 kept_groups=3 scale=16`. The papers' device-level losses concern the mapping of experts to
    devices and are left out. Their expert-level loss is `load_balance` with the same coefficient: 0.01 in the 2B model,
    0.001 at 16B.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of DeepSeekMoE."""

        name: str = "deepseek_moe"
        top_k: int = 6
        """Experts per token."""
        scale: float = 1.0
        """Factor on all weights."""
        num_groups: int = 1
        """Groups of consecutive experts, for group-limited selection; 1: no groups."""
        kept_groups: int = 1
        """Groups that a token may use: those that contain its highest probabilities."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        check_kept_groups(config.num_groups, config.kept_groups, config.top_k, num_experts)
        require(config.scale > 0, "router.scale", config.scale, "greater than 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        options = self.options
        logits_TE = self.gate(x_TD)
        rule = TopKRule(top_k=options.top_k, ranks_scores=True)
        restrict = limit_to_groups(options.num_groups, options.kept_groups, best_of=1)
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule, restrict=restrict)
        return Routing.from_top_k(
            expert_TK,
            options.scale * weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
