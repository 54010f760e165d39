"""DeepSeekMoE: raw softmax weights of many fine experts, chosen among a token's best groups."""

from dataclasses import dataclass, field

from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.group_limit import check_kept_groups, within_best_groups
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  w = scale · p_top-k,  y = Σ_i w_i E_i(x)  (+ shared experts)",
        paper="arXiv:2401.06066, eq. 9-11; groups: arXiv:2405.04434, section 2.2.2",
        use="Many narrow experts beside a shared one: it goes with the layout `fine_grained`.",
        beware="Weights sum to less than 1 and shrink as experts get more, so the output depends on the factor "
        "`scale`. Without its balance loss it collapses like any softmax top-k.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class DeepSeekMoE(Router["DeepSeekMoE.Config"]):
    """Token choice for fine-grained experts beside shared ones (Dai et al. 2024, DeepSeek-AI 2024).

    The fine experts and the shared ones are the layout's (`fine_grained`); what is left of the algorithm is a
    softmax over all experts whose k best values are used as they are. DeepSeek-V2 adds the limit to groups and the
    factor: 160 experts, `top_k=6 num_groups=8 kept_groups=3 scale=16`. Its losses between devices belong to the
    machines and not to the router, and are not here. The expert-level loss of the paper is `load_balance` with the
    same coefficient: 0.01 in its 2B model, 0.001 at 16B.
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
        """Groups of neighbouring experts, among which a token chooses first; 1: no groups."""
        kept_groups: int = 1
        """Groups that a token may use: those that hold the highest probabilities."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E and groups that do not fit."""
        check_top_k(config.top_k, num_experts)
        check_kept_groups(config.num_groups, config.kept_groups, config.top_k, num_experts)
        require(config.scale > 0, "router.scale", config.scale, "greater than 0")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the k most probable experts of its best groups."""
        options = self.options
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        selection_TE = within_best_groups(scores_TE, options.num_groups, options.kept_groups, best_of=1)
        expert_TK = rank_top_k(selection_TE, options.top_k, quantum=SCORE_QUANTUM)
        weight_TK = scores_TE.gather(-1, expert_TK)
        return Routing.from_top_k(
            expert_TK,
            options.scale * weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
