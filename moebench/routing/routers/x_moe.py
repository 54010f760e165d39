"""X-MoE: routing by the cosine between token and expert in a low-dimensional space (arXiv:2204.09179).

Tokens are projected to a few dimensions; logits are cosines with learned expert embeddings, divided by a learned
temperature. Normalisation keeps an expert from winning by the length of its embedding.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import Routing

MAX_SCALE = 100.0
"""Upper bound of 1/τ."""


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="h_e = cos(P x, m_e) / τ,  p = softmax(h),  w = p_top-k,  y = Σ_i w_i E_i(x)",
        paper="arXiv:2204.09179, section 3.2",
        use="When token representations collapse towards expert embeddings: only directions count.",
        beware="The temperature alone limits the gate's confidence; where it stays high, routing stays uniform.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; over capacity, the earlier token stays",
            batch_dependent=False,
        ),
    )
)
class XMoE(Router["XMoE.Config"]):
    """Top-k of cosines on a low-dimensional hypersphere (Chi et al. 2022), against representation collapse.

    Tokens and experts are both normalised and the temperature is learned, as in the paper; its released code
    (torchscale) normalises only the experts and has no temperature. 1/τ is clamped to 100, as in Tutel's version.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of X-MoE."""

        name: str = "x_moe"
        top_k: int = 1
        """Experts per token."""
        rank: int = 16
        """Dimensions of the space in which tokens and experts are compared."""
        temperature: float = 0.07
        """Initial temperature τ; it is learned."""
        losses: dict[str, float] = field(default_factory=lambda: {"load_balance": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.top_k = config.top_k
        self.temperature = config.temperature
        self.projection = Gate(context.d_model, config.rank, init_scale=1.0)
        self.expert_ER = nn.Parameter(torch.empty(context.num_experts, config.rank))
        self.log_scale = nn.Parameter(torch.empty(()))

    def init_weights(self, generator: Generator) -> None:
        """Draw the directions of the experts, and start at the temperature of the options."""
        nn.init.normal_(self.expert_ER, generator=generator)
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.rank >= 1, "router.rank", config.rank, "at least 1")
        least = 1 / MAX_SCALE
        require(config.temperature >= least, "router.temperature", config.temperature, f"at least {least:g}")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        token_TR = functional.normalize(self.projection(x_TD), dim=-1, eps=1e-6)
        expert_ER = functional.normalize(self.expert_ER.float(), dim=-1, eps=1e-6)
        scale = self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp()
        logits_TE = scale * functional.linear(token_TR, expert_ER)
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, TopKRule(top_k=self.top_k))
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )
