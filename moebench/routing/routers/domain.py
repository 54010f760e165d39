"""Domain routing: one expert for each domain of the data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.domains import check_domains
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = domain of the sequence (mod E),  y = E_i(x);  or in evaluation, and for domains that were not"
        " trained, y = Σ_e π_e E_e(x)",
        paper="arXiv:2108.05036, sections 3 and 5",
        use="Sequences have known domains, and experts shall be added, removed or served domain by domain.",
        beware="Loads are those of the data. Needs a label in evaluation too, or mixes all experts by the prior, "
        "at E times the cost.",
        causality=Causality(causal=True, reason="the domain is known beside the text", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Domain(Router["Domain.Config"]):
    """DEMix (Gururangan et al. 2021): experts that can be added, taken away and mixed, since each has its domain.

    With more domains than experts several share one. In evaluation the label may be unknown: `prior` mixes all experts
    by the share of training tokens that each saw. The paper's posterior, the prior times the likelihood of the text so
    far under each expert, needs the model's own predictions with each expert and is no routing; `domain_posterior` has
    a posterior that fits in a layer. A domain that was held out of training has no expert: its tokens are mixed by the
    prior whatever `evaluation` says, by the experts that have seen any token.
    """

    count_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of domain routing."""

        name: str = "domain"
        evaluation: Literal["label", "prior"] = "label"
        """Label: the expert of the sequence's domain, as in training. Prior: all experts, weighted by the prior."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_domains = check_domains(config.name, context)
        self.evaluation = config.evaluation
        self.level = context.level
        self.register_buffer("count_E", torch.zeros(context.num_experts, dtype=torch.float64))

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert of its domain, or in evaluation to all that the prior allows."""
        assert ctx.domain_T is not None
        expert_TK = self.level.expert_of(ctx.domain_T, self.num_experts).unsqueeze(-1)
        if ctx.training:
            weight_TK = torch.ones(expert_TK.shape, dtype=torch.float32, device=x_TD.device)
            return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
        own_TE = torch.zeros(x_TD.shape[0], self.num_experts, device=x_TD.device).scatter(1, expert_TK, 1.0)
        is_own_T1 = (ctx.domain_T < self.num_domains).unsqueeze(-1) & (self.evaluation == "label")
        weight_TE = own_TE.where(is_own_T1, self.prior_E)
        return Routing.from_table(weight_TE, weight_TE > 0).compact()

    @property
    @override
    def traits(self) -> RouterTraits:
        # Evaluation by the prior uses all experts.
        return replace(super().traits, has_variable_k=super().traits.has_variable_k or self.evaluation == "prior")

    @property
    def prior_E(self) -> Tensor:
        """Share of training tokens of each expert; uniform before training."""
        total = self.count_E.sum()
        even_E = torch.full_like(self.count_E, 1 / self.num_experts)
        return torch.where(total > 0, self.count_E / total.clamp(min=1), even_E).float()

    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Count the step's tokens."""
        self.count_E.add_(load_E)
