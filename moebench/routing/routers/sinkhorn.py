"""S-BASE: tokens choose experts in an entropic transport plan, computed by Sinkhorn iterations (arXiv:2202.01169).

In training the exponentiated logits are rescaled alternately over tokens and experts until both sums are even, and the
top k of each row are selected. The weights are those of the logits. Evaluation selects by the logits.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.logit_router import LogitRouter
from moebench.routing.router import (
    ROUTERS,
    Causality,
    Facts,
    RouterBuildContext,
    RouterConfig,
    RouterTraits,
    check_top_k,
)
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="global assignment",
        equation="Π = diag(u) exp(W x) diag(v) with even columns,  training: i = top-k of Π,  evaluation: of W x;  w = "
        "sigmoid(h_i) at k=1, softmax(h)_i else",
        paper="arXiv:2202.01169, section 3 and appendix B (S-BASE)",
        use="When loads should be nearly even in training, in less time than an exact assignment takes.",
        beware="Loads are not exactly even, so tokens are still dropped at a capacity. Training and evaluation route "
        "differently, and in training the plan depends on later tokens.",
        causality=Causality(
            causal=False,
            reason="in training, the scale of each expert is computed over all tokens of the batch",
            batch_dependent=False,  # evaluation does not use the plan
            in_evaluation=True,
        ),
        cost="iterations·T·E",
    )
)
class Sinkhorn(LogitRouter["Sinkhorn.Config"]):
    """Selection by a Sinkhorn plan (Clark et al. 2022): nearly even loads in training without a loss.

    The plan has even sums over tokens and over experts, but the top k of its rows are not exactly balanced. It only
    selects: no gradient passes through the iterations, and the weights are those of the logits. The paper iterates to a
    tolerance; here a fixed number of iterations keeps the cost known. No balance loss should be added.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of S-BASE."""

        name: str = "sinkhorn"
        top_k: int = 1
        """Experts per token."""
        iterations: int = 10
        """Sinkhorn iterations, each one scaling of all rows and all columns."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.top_k = config.top_k
        self.iterations = config.iterations

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.iterations >= 1, "router.iterations", config.iterations, "at least 1")

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
        log_scale_E = None
        if ctx.training:
            # The row scale u is left out, because it does not change the order within a row.
            log_scale_E = compute_column_scale(logits_TE.detach(), self.iterations, ctx.valid_T).log()
        rule = TopKRule(top_k=self.top_k, score="sigmoid" if self.top_k == 1 else "softmax")
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule, bias_E=log_scale_E)
        return Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )


@torch.no_grad()
def compute_column_scale(logits_TE: Tensor, iterations: int, valid_T: Tensor | None = None) -> Tensor:
    """Return v_E of the plan diag(u) exp(h) diag(v) with all row sums 1 and all column sums T/E."""
    weight_TE = (logits_TE - logits_TE.amax(-1, keepdim=True)).exp()  # u absorbs what is subtracted from a row
    if valid_T is not None:
        weight_TE = weight_TE * valid_T.unsqueeze(-1)
    scale_E = torch.ones_like(weight_TE[:1].sum(0))
    for _ in range(iterations):
        row_T = (weight_TE * scale_E).sum(-1)
        share_TE = weight_TE / row_T.clamp(min=1e-20).unsqueeze(-1)
        # The clamp bounds the scale of an expert to which no token gives any weight.
        scale_E = 1 / share_TE.sum(0).clamp(min=1e-20)
        scale_E = scale_E / scale_E.amax()
    return scale_E.clamp(min=1e-30)
