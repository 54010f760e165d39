"""BASE layers: tokens are assigned to experts by solving a balanced assignment problem (arXiv:2103.16716).

In training the batch is assigned to experts at equal loads so that the summed token-expert affinity is maximal; in
evaluation each token goes to its expert of highest affinity. The output is weighted by the sigmoid of the affinity.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.assignment import solve_balanced_assignment
from moebench.routing.context import RouteContext
from moebench.routing.gate import TRUNCATED_STD, Gate
from moebench.routing.logit_router import LogitRouter
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="global assignment",
        equation="training: max Σ_t a_{t,i(t)} with every load at most ⌈T/E⌉;  evaluation: i = argmax a;  "
        "a = W x,  y = sigmoid(a_i) E_i(x)",
        paper="arXiv:2103.16716, section 2 and algorithm 1",
        use="When loads must be even in training without a loss or a capacity.",
        beware="Training and evaluation route differently, and in training the assignment leaks information about "
        "later tokens. It takes longer than any other router.",
        causality=Causality(
            causal=False,
            reason="in training, the expert of a token depends on all tokens of the batch",
            batch_dependent=False,  # evaluation is greedy
            in_evaluation=True,
        ),
        balanced=True,
        cost="rounds·T·E",
    )
)
class Base(LogitRouter["Base.Config"]):
    """Balanced assignment of sparse experts (Lewis et al. 2021): equal loads in training without a loss.

    The price is that training and evaluation route differently. The paper's output σ(a) F(x) + (1 - σ(a)) x, with F a
    stack of residual networks, equals x plus σ(a) times what F adds, which here is the block's residual connection. The
    paper shuffles tokens between workers, each of which balances its share; here the whole batch is balanced. If E does
    not divide T, no expert has more than ⌈T/E⌉ tokens.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of BASE."""

        name: str = "base"
        solver: Literal["auction", "exact", "sinkhorn"] = "sinkhorn"
        """Solver of the assignment problem; all find an optimum. exact: SciPy (slow). auction: the paper's auction,
        then exchanges. sinkhorn: the same with better initial prices."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        # Rows of length 0.1, the paper's gain; its rows are orthogonal, these approximately if d_model is large.
        self.gate = Gate(context.d_model, context.num_experts, init_scale=(0.1 / TRUNCATED_STD) ** 2)
        self.solver = config.solver

    @property
    @override
    def traits(self) -> RouterTraits:
        return replace(super().traits, needs_whole_batch=self.training)

    @override
    def score_tokens(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE: Tensor = self.gate(x_TD)
        return logits_TE

    @override
    def assign(self, logits_TE: Tensor, ctx: RouteContext) -> Routing:
        expert_T = rank_top_k(logits_TE, 1).squeeze(-1)
        if ctx.training:
            expert_T = self._assign(logits_TE.detach(), expert_T, ctx.valid_T)
        expert_TK = expert_T.unsqueeze(-1)
        scores_TE = logits_TE.sigmoid()
        return Routing.from_top_k(
            expert_TK,
            scores_TE.gather(1, expert_TK),
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )

    def _assign(self, affinity_TE: Tensor, expert_T: Tensor, valid_T: Tensor | None) -> Tensor:
        if valid_T is None:
            return solve_balanced_assignment(affinity_TE, self.solver)
        index_R = valid_T.nonzero().squeeze(1)  # padding takes no slot
        return torch.index_put(expert_T, (index_R,), solve_balanced_assignment(affinity_TE[index_R], self.solver))
