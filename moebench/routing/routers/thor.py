"""THOR: experts drawn at random and trained to agree with each other."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.features.consistency import Consistency
from moebench.routing.features.feature import Feature
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="stochastic",
        equation="i ~ uniform(E) for the whole batch,  y = E_i(x);  two passes: + α · ½ Σ (p - q)(log p - log q)",
        paper="arXiv:2110.04260",
        use="For a model without a learned router: every expert serves every token, and the agreement of two passes "
        "regularises it.",
        beware="Training costs twice as much for each token. Experts cannot specialise, and evaluation draws "
        "experts too.",
        causality=Causality(
            causal=True, reason="the draw depends on no token", batch_dependent=True, draws_in_evaluation=True
        ),
        learned=False,
        makes_scores=False,
    )
)
class Thor(Router["Thor.Config"]):
    """THOR (Zuo et al. 2021): no learned router and no balance loss; two passes with different draws must agree.

    The paper adds the losses of the two passes and α times their divergence. Here the losses are averaged, so that they
    compare with other arms', and its α is twice our coefficient: 0.5 is its 1, and it uses 5 for translation. The
    second pass doubles the cost of training, which `plan` shows and comparisons mark.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of THOR."""

        name: str = "thor"
        consistency: float = 0.5
        """Coefficient of the divergence between two passes; at 0 there is one pass."""
        training: Literal["batch", "sequence", "token"] = "batch"
        """Unit for which one expert of each layer is drawn in training."""
        evaluation: Literal["token", "sequence", "average"] = "token"
        """Unit for which one expert is drawn in evaluation; average: all experts with equal weights, at the cost of
        all."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)

    @classmethod
    @override
    def required_features(cls, config: Config) -> tuple[Feature, ...]:
        return (Consistency(coefficient=config.consistency),) if config.consistency else ()

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        require(config.consistency >= 0, "router.consistency", config.consistency, "at least 0")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        num_tokens = x_TD.shape[0]
        scope = self.config.training if ctx.training else self.config.evaluation
        if scope == "average":
            expert_TK = torch.arange(self.num_experts, device=x_TD.device).expand(num_tokens, -1)
        elif scope == "batch":
            expert_TK = self._select_expert(ctx.uniform_for_all().expand(num_tokens, 1))
        else:
            draw_BL = ctx.uniform(num_tokens).view(-1, ctx.sequence_length)
            draw_BL = draw_BL[:, :1].expand_as(draw_BL) if scope == "sequence" else draw_BL
            expert_TK = self._select_expert(draw_BL.reshape(-1, 1))
        weight_TK = torch.full(expert_TK.shape, 1 / expert_TK.shape[1], dtype=torch.float32, device=x_TD.device)
        return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)

    @property
    @override
    def traits(self) -> RouterTraits:
        # Evaluation by the average uses all experts.
        return replace(super().traits, has_variable_k=self.config.evaluation == "average")

    def _select_expert(self, draw_TK: Tensor) -> Tensor:
        return (draw_TK * self.num_experts).long().clamp(max=self.num_experts - 1)
