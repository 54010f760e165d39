"""Top-p: as many of the most probable experts as needed to reach a cumulative probability P (arXiv:2403.07652).

The experts of a token are sorted by their softmax probability and used until their sum reaches P, weighted by the
probabilities. Confident tokens use one expert, uncertain ones more.
"""

from dataclasses import dataclass, field

from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k, round_to_quantum
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.selection import select
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="p = softmax(W x) in descending order;  k(x) = min{k : p_1 + ... + p_k ≥ P};  "
        "y = Σ_{i≤k(x)} p_i E_i(x)",
        paper="arXiv:2403.07652, section 3.2",
        use="When confident tokens should use one expert and uncertain ones more, without choosing k.",
        beware="The gate may become uncertain in order to use more experts: keep the entropy loss. Executed cost "
        "differs from the planned one, so read the load metrics.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
        budget=Knob(attribute="top_p", low=1e-3, high=1 - 1e-6, unit=1.0, is_probability=True),
    )
)
class TopP(Router["TopP.Config"]):
    """Use experts up to a cumulative probability P (Huang et al. 2024), weighted by their raw probabilities.

    The expert that crosses P is included, so there is always one. Without the entropy loss (the paper's dynamic loss,
    coefficient 1e-4) training tends to raise the entropy and use more experts. Their number is learned, not set: arms
    are matched at `expected_experts`, and the load metrics show the actual number. The paper's balance loss
    (coefficient 0.01) counts assignments per token, ours the share of all assignments, 1 at uniform routing: at the
    same coefficient ours is weaker by the mean number of experts per token.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of top-p."""

        name: str = "top_p"
        top_p: float = 0.4
        """Cumulative probability P that the selected experts must reach."""
        expected_experts: int = 2
        """Experts per token for which the width of experts is matched; does not affect the routing."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01, "local_entropy": 1e-4})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_p: float | Tensor = config.top_p

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.expected_experts

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(0 < config.top_p <= 1, "router.top_p", config.top_p, "greater than 0 and at most 1")
        check_top_k(config.expected_experts, num_experts, key="expected_experts")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        expert_TE = rank_top_k(logits_TE, self.num_experts)
        weight_TE = scores_TE.gather(-1, expert_TE)
        # Exclusive: exactly 0 for the first expert, which is always used.
        cumulative_TE = weight_TE.detach().cumsum(-1) - weight_TE.detach()
        # Rounded, so that of ten equal experts the first four reach 0.4 in any order of summation.
        top_p = self.top_p  # a tensor where it is adjusted in training
        share = top_p.clamp(min=SCORE_QUANTUM) if isinstance(top_p, Tensor) else max(top_p, SCORE_QUANTUM)
        used_TE = round_to_quantum(cumulative_TE - share, SCORE_QUANTUM) < 0
        routing = Routing.from_top_k(
            expert_TE, weight_TE, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
        return select(routing, used_TE.reshape(-1))
