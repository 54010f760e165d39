"""Multi-gate mixture of experts (MMoE): all domains share the experts, and each has its own gate.

Paper: doi:10.1145/3219819.3220007. A token is weighted by the softmax of the gate of its domain, over all experts or
the top k.
"""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.domains import append_mean, check_domains, get_domain_index
from moebench.routing.gate import TRUNCATION
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing

INIT_SCALE = 0.1
"""Variance of the initial weights before truncation, times d_model, as in `Gate`."""


@ROUTERS.register(
    Facts(
        family="static",
        equation="p = softmax(W_g x),  g the domain of the token,  y = Σ_e p_e E_e(x)",
        paper="doi:10.1145/3219819.3220007, section 4.2 (MMoE)",
        use="In multi-task learning with few experts and known domains.",
        beware="All experts are computed unless `top_k` is set. The gate of a domain with little data is poorly "
        "trained.",
        causality=Causality(
            causal=True, reason="each token is weighted by its own vector and its domain", batch_dependent=False
        ),
        balanced=True,
        cost="T·E·domains",
    )
)
class MultiGate(Router["MultiGate.Config"]):
    """MMoE (Ma et al. 2018): domains differ in how they mix the experts, all of which are used unless top_k is set.

    The gates of all domains are computed for every token, which costs little beside the experts. A domain held out of
    training uses the mean of all gates.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of multi-gate."""

        name: str = "multi_gate"
        top_k: int | None = None
        """Experts per token, weighted by their probabilities; null: all of them (the paper)."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.weight_EGD = nn.Parameter(
            torch.empty(context.num_experts, check_domains(config.name, context), context.d_model)
        )
        self.top_k = config.top_k or context.num_experts

    def init_weights(self, generator: Generator) -> None:
        """Initialise every gate as `Gate` does."""
        std = (INIT_SCALE / self.weight_EGD.shape[-1]) ** 0.5
        nn.init.trunc_normal_(self.weight_EGD, std=std, a=-TRUNCATION * std, b=TRUNCATION * std, generator=generator)

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k or num_experts

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        if config.top_k is not None:
            check_top_k(config.top_k, num_experts)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        assert ctx.domain_T is not None
        logits_TH = functional.linear(x_TD.float(), self.weight_EGD.flatten(0, 1).float())
        logits_TEG = logits_TH.view(-1, *self.weight_EGD.shape[:2])
        gate_T = get_domain_index(ctx.domain_T, logits_TEG.shape[2])
        logits_TEG = logits_TEG if ctx.training else append_mean(logits_TEG, dim=2)
        logits_TE = logits_TEG.gather(2, gate_T.view(-1, 1, 1).expand(-1, self.num_experts, 1)).squeeze(2)
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=self.top_k))
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    @override
    def flops_per_token(self) -> int:
        return 2 * self.weight_EGD.numel()
