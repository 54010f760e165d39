"""ReMoE: ReLU gating in place of top-k, kept sparse by an adaptive L1 penalty (arXiv:2412.14711).

The weights are the ReLU of the logits; a token uses all experts of positive weight. After each step the coefficient of
the L1 penalty is adapted so that tokens use k experts on average.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing

MAX_GROWTH = 1e12
"""Bound of λ/λ_0 and of its inverse."""


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="w = ReLU(W x),  y = Σ_{e: w_e > 0} w_e E_e(x),  loss λ Σ_e f_e mean_t w_te,  λ adapted to k experts",
        paper="arXiv:2412.14711, sections 3.2 and 3.3",
        use="For fully differentiable sparse routing: a token can have any number of experts, and weights reach 0 "
        "continuously.",
        beware="It is nearly dense at first, which the cost of matched arms does not count. Tokens may get no expert. "
        "A large factor alpha makes the penalty oscillate.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector; the penalty depends on past steps only",
            batch_dependent=False,
        ),
        variable_k=True,
        own_losses=("sparsity",),
    )
)
class ReMoE(Router["ReMoE.Config"]):
    """ReLU routing with an adaptive L1 penalty (Wang, Zhu and Chen 2024): any number of experts per token, also none.

    After each step λ is multiplied by α if tokens used more than k experts on average, and divided by α if fewer. The
    loss `sparsity` is the penalty times λ/λ_0, a state of the router, and its coefficient is λ_0. The penalty is
    weighted by f_e = E · n_e / (k T), which also balances the experts; at even loads it is the mean sum of a token's
    weights. The paper adapts one λ to the mean over all layers; here each layer has its own. Training is almost dense
    at first (half of all experts are active), which the cost of a matched arm does not count.
    """

    growth: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of ReMoE."""

        name: str = "remoe"
        top_k: int = 2
        """Target number of experts per token on average."""
        alpha: float = 1.2
        """Factor by which λ changes per step; the paper finds 1.05 to 1.3 equally good, 1.5 unstable."""
        losses: dict[str, float] = field(default_factory=lambda: {"sparsity": 1e-8})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts, init_scale=1.0)
        self.top_k = config.top_k
        self.alpha = config.alpha
        self.register_buffer("growth", torch.ones(()))

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(config.top_k, num_experts)
        require(config.top_k < num_experts, "router.top_k", config.top_k, f"below layout.num_experts={num_experts}")
        require(1 <= config.alpha <= 2, "router.alpha", config.alpha, "from 1 (λ fixed) to 2")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        weight_TE = logits_TE.relu()
        return Routing.from_table(weight_TE, weight_TE > 0, logits_TE=logits_TE, scores_TE=weight_TE)

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        weight_TE = record.routing.scores_TE
        assert weight_TE is not None

        def formula(share_E: Tensor, mean_E: Tensor) -> Tensor:
            return self.growth.float() * torch.dot(share_E * (self.num_experts / self.top_k), mean_E)

        return {"sparsity": reduce_record(record, formula, means=[weight_TE.detach().sign(), weight_TE])}

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        routing, valid_T = record.routing, record.valid_T
        num_active = routing.load_E.sum()
        num_tokens = torch.full_like(num_active, routing.num_tokens) if valid_T is None else valid_T.sum()
        return {"active": num_active, "tokens": num_tokens}

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        excess = torch.sign(statistics["active"] - self.top_k * statistics["tokens"]).to(self.growth.dtype)
        self.growth.copy_((self.growth * self.alpha**excess).clamp(1 / MAX_GROWTH, MAX_GROWTH))
