"""DEMix: one expert for each domain of the data (arXiv:2108.05036).

A sequence goes to the expert of its domain label. In evaluation all experts can be mixed by a prior instead, for
unknown domains.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.domains import check_domains, number_domains
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="static",
        equation="i = domain of the sequence (mod E),  y = E_i(x);  or in evaluation, and for domains held out of "
        "training, y = Σ_e π_e E_e(x)",
        paper="arXiv:2108.05036, sections 3 and 5",
        use="When domains are known, and experts are added, removed or served for each domain.",
        beware="Loads are those of the data. Evaluation needs a label too, or mixes all experts by the prior at E "
        "times the cost.",
        causality=Causality(causal=True, reason="the domain is given with the text", batch_dependent=False),
        cost="T",
        learned=False,
        makes_scores=False,
    )
)
class Domain(Router["Domain.Config"]):
    """DEMix (Gururangan et al. 2021): experts can be added, removed and mixed, because each has its own domain.

    With more domains than experts, several share one. In evaluation the label may be unknown: `prior` mixes all experts
    by the share of training tokens that each has seen. The paper's posterior, the prior times the likelihood of the
    text so far under each expert, needs predictions of the whole model with each expert and is not a layer's routing;
    see `domain_posterior` for one that is. A domain held out of training has no expert: its tokens are mixed by the
    prior, whatever the option `evaluation`.
    """

    count_E: Tensor
    number_D: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of domain routing."""

        LEFT_OUT_AT_DEFAULT: ClassVar[tuple[str, ...]] = ("domains",)

        name: str = "domain"
        evaluation: Literal["label", "prior"] = "label"
        """Use the expert of the sequence's domain, as in training (label), or mix all experts by the prior (prior)."""
        domains: list[str] = field(default_factory=list)
        """Names of domains in the order of their experts; empty: those of training, in the order of the data. A model
        that continues with other domains (`init`) keeps the experts of those that it lists, trained on now or not."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        num_trained = check_domains(config.name, context)
        self.is_listed = bool(config.domains)
        self.num_domains = len(config.domains) or num_trained
        self.domains = tuple(config.domains) or context.data.domains[:num_trained]
        """Names in the order of their numbers."""
        self.data_domains = context.data.domains
        self.evaluation = config.evaluation
        self.level = context.level
        self.register_buffer("count_E", torch.zeros(context.num_experts, dtype=torch.float64))
        numbers = number_domains(config.domains, context.data)
        # The last one is for text of domains that the data lack, on which a trained model can be evaluated.
        number_D = torch.tensor([*numbers, self.num_domains], dtype=torch.int64)
        self.register_buffer("number_D", number_D, persistent=False)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        number_T = self.number(ctx)
        assert number_T is not None
        expert_TK = self.level.select_expert(number_T, self.num_experts).unsqueeze(-1)
        if ctx.training:
            weight_TK = torch.ones(expert_TK.shape, dtype=torch.float32, device=x_TD.device)
            return Routing.from_top_k(expert_TK, weight_TK, num_experts=self.num_experts)
        one_hot_TE = torch.zeros(x_TD.shape[0], self.num_experts, device=x_TD.device).scatter(1, expert_TK, 1.0)
        uses_label_T1 = (number_T < self.num_domains).unsqueeze(-1) & (self.evaluation == "label")
        weight_TE = one_hot_TE.where(uses_label_T1, self.prior_E)
        return Routing.from_table(weight_TE, weight_TE > 0).compact()

    def number(self, ctx: RouteContext) -> Tensor | None:
        """Return the number of each token's domain, int64: that of its expert where there is one for each."""
        return self.number_D[ctx.domain_T] if self.is_listed and ctx.domain_T is not None else ctx.domain_T

    @property
    @override
    def traits(self) -> RouterTraits:
        return replace(super().traits, has_variable_k=super().traits.has_variable_k or self.evaluation == "prior")

    @property
    def prior_E(self) -> Tensor:
        """Share of training tokens of each expert; uniform before training."""
        total = self.count_E.sum()
        uniform_E = torch.full_like(self.count_E, 1 / self.num_experts)
        return torch.where(total > 0, self.count_E / total.clamp(min=1), uniform_E).float()

    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        self.count_E.add_(load_E)
