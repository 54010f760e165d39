"""Top-p: as many experts as it takes to reach a share of the probability."""

from dataclasses import dataclass, field

from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k, rounded
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="p = softmax(W x) sorted down;  k(x) = min{k : p_1 + ... + p_k ≥ P};  y = Σ_{i≤k(x)} p_i E_i(x)",
        paper="arXiv:2403.07652, section 3.2",
        use="Sure tokens shall use one expert and undecided ones more, with no k to choose.",
        beware="The gate may grow undecided to use more experts: keep the entropy loss. Costs differ from those "
        "planned, so read the load metrics.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
    )
)
class TopP(Router["TopP.Config"]):
    """Sure tokens use one expert, undecided ones more (Huang et al. 2024); weights are the raw probabilities.

    The expert that crosses P is among those used, so there is always one. Without the entropy loss (the paper's dynamic
    loss, coefficient 1e-4) training would rather raise the entropy and use more experts. Their number is found in
    training, not set: arms are matched at `expected_experts`, and the real cost stands in the load metrics. The paper's
    balance loss (coefficient 0.01) counts assignments per token, ours the share of all assignments, 1 at uniform
    routing: at the same coefficient ours is weaker by the mean number of experts per token.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of top-p."""

        name: str = "top_p"
        top_p: float = 0.4
        """P: probability that the chosen experts must reach together."""
        expected_experts: int = 2
        """Experts per token by which the width of experts is matched; says nothing about the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "local_entropy": 1e-4})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_p = config.top_p

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return the number that arms are matched at."""
        return config.expected_experts

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse a P outside 0 ... 1."""
        require(0 < config.top_p <= 1, "router.top_p", config.top_p, "greater than 0 and at most 1")
        check_top_k(config.expected_experts, num_experts, key="expected_experts")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its best experts until they reach P."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TE = rank_top_k(logits_TE, self.num_experts)
        weight_TE = scores_TE.gather(-1, expert_TE)
        before_TE = weight_TE.detach().cumsum(-1) - weight_TE.detach()  # exactly 0 for the first: it is always used
        # Of ten equal experts the first four reach 0.4, however their sum is rounded.
        used_TE = rounded(before_TE - max(self.top_p, SCORE_QUANTUM), SCORE_QUANTUM) < 0
        return (
            Routing.from_top_k(
                expert_TE, weight_TE, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
            )
            .keep(used_TE.reshape(-1))
            .compact()
        )  # a hole would keep a place that rerouting may need
