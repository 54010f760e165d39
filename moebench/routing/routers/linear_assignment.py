"""BASE layers: in training, tokens are assigned to experts by the solution of a balanced assignment problem."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.assignment import solve_balanced_assignment
from moebench.routing.context import RouteContext
from moebench.routing.gate import CUT_STD, Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="global assignment",
        equation="training: max Σ_t a_{t,i(t)} with every load at most ⌈T/E⌉;  evaluation: i = argmax a;  "
        "a = W x,  y = sigmoid(a_i) E_i(x)",
        paper="arXiv:2103.16716, section 2 and algorithm 1",
        use="Even loads in training without any loss or capacity.",
        beware="Training and evaluation route differently, and in training the choice tells something of later "
        "tokens. The assignment takes longer than any other router's choice.",
        causality=Causality(
            causal=False,
            reason="in training, which expert a token is given depends on all tokens of the batch",
            batch_dependent=False,  # evaluation is greedy: balancing it would look at later tokens
            in_evaluation=True,
        ),
        balanced=True,
        cost="rounds·T·E",
    )
)
class Base(Router["Base.Config"]):
    """Balanced assignment of sparse experts (Lewis et al. 2021): perfectly even loads in training, without a loss.

    The price is that training and evaluation route differently. The paper's output σ(a) F(x) + (1 - σ(a)) x, with F a
    stack of residual networks, is x + σ(a) times what F adds: the block's own residual stream does that here. The
    paper shuffles tokens between workers and lets each balance its share; here the whole batch is balanced. Where E
    does not divide T, no expert has more than ⌈T/E⌉ tokens.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of BASE."""

        name: str = "base"
        solver: Literal["auction", "exact", "sinkhorn"] = "sinkhorn"
        """How the best assignment is found. Exact: SciPy (slow). Auction: that of the paper, then exchanges. Sinkhorn:
        the same from good first prices."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        # Rows of length 0.1, the paper's gain; its rows are orthogonal, these nearly so where d_model is large.
        self.gate = Gate(context.d_model, context.num_experts, init_scale=(0.1 / CUT_STD) ** 2)
        self.solver = config.solver

    @property
    @override
    def traits(self) -> RouterTraits:
        # In training, the tokens of all sequences compete for places.
        return replace(super().traits, needs_whole_batch=self.training)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Give each token its place in the best balanced assignment; in evaluation, the expert it likes best."""
        logits_TE = self.gate(x_TD)
        expert_T = rank_top_k(logits_TE, 1).squeeze(-1)
        if ctx.training:
            expert_T = self._balanced(logits_TE.detach(), expert_T, ctx.valid_T)
        expert_TK = expert_T.unsqueeze(-1)
        scores_TE = logits_TE.sigmoid()
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )

    def _balanced(self, affinity_TE: Tensor, expert_T: Tensor, valid_T: Tensor | None) -> Tensor:
        if valid_T is None:
            return solve_balanced_assignment(affinity_TE, self.solver)
        place_R = valid_T.nonzero().squeeze(1)  # padding takes no place
        return torch.index_put(expert_T, (place_R,), solve_balanced_assignment(affinity_TE[place_R], self.solver))
