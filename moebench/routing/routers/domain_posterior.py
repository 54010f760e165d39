"""DEMix with unknown domains: in evaluation experts are mixed by a posterior over domains (arXiv:2108.05036).

Training routes by the domain label and trains a classifier of the domain on the mean of the tokens so far. Evaluation
weights all experts by the classifier's probabilities.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig
from moebench.routing.routers.domain import Domain
from moebench.routing.values import LayerRecord, Routing

NO_EXPERT = -100
"""Target of tokens whose domain has no expert."""


@ROUTERS.register(
    Facts(
        family="static",
        equation="training: y = E_d(x_t), d the domain;  evaluation: y = Σ_e p_e E_e(x_t), p = softmax(W x̄_t + ln π),"
        "  x̄_t = mean_{s≤t} sg(x_s)",
        paper="arXiv:2108.05036, section 5 (mixing experts by a posterior over domains)",
        use="When experts belong to known domains, but the domain of the text is unknown in evaluation.",
        beware="Evaluation uses all experts, at their full cost. The posterior needs some tokens to identify the "
        "domain. Experts are mixed layer by layer, not by predictions of whole models as in DEMix.",
        causality=Causality(
            causal=True,
            reason="the posterior depends on the tokens up to this one",
            batch_dependent=False,
            reads_sequence=True,
        ),
        trained_by_own_loss=("gate",),
        makes_scores=False,
        own_losses=("domain",),
        variable_k=True,
    )
)
class DomainPosterior(Domain):
    """`domain` in training; in evaluation the label is not used and experts are mixed by a posterior over domains.

    DEMix computes the posterior by Bayes' rule: the prior times the likelihood of the text so far under the model with
    each expert, which takes E forward passes of the whole model. Here every layer has a classifier on the mean of its
    input so far, trained to predict the expert of the domain (loss `domain`, the cross-entropy divided by ln E: 1 at
    uniform predictions). No gradient of that loss reaches the network below, and none of the task loss reaches the
    classifier. So the posterior is discriminative: it depends on the layer's input and not on how well each expert
    predicts.

    DEMix mixes the next-token probabilities of the models; here each layer mixes the outputs of its experts, which
    gives more confident predictions where experts disagree: logits (4, 0) and (0, 0) with weights 1/2 give .881, and as
    mixed probabilities .741. As in the paper the prior is a separate factor: π counts training tokens, the classifier
    is trained on top of it, and evaluation may use another. In evaluation all experts compute all tokens; only training
    is matched. Domains held out of training are mixed in the same way, by the experts of similar domains.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of domain routing by a posterior."""

        LEFT_OUT_AT_DEFAULT: ClassVar[tuple[str, ...]] = ("domains",)

        name: str = "domain_posterior"
        prior: Literal["counted", "even"] = "counted"
        """Prior π in evaluation: the experts' shares of training tokens (counted), or uniform (even), for evaluation
        data with other proportions of domains than training."""
        losses: dict[str, float] = field(default_factory=lambda: {"domain": 0.1})
        domains: list[str] = field(default_factory=list)
        """Names of domains in the order of their experts; empty: those of training, in the order of the data. A model
        that continues with other domains (`init`) keeps the experts of those that it lists, trained on now or not."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(Domain.Config(name=config.name, domains=config.domains), context)
        self.config, self.prior = config, config.prior
        self.gate = Gate(context.d_model, context.num_experts)

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        is_uniform = not ctx.training and self.prior == "even"
        logits_TE = self.gate(compute_running_means(x_TD.detach().float(), ctx))
        logits_TE = logits_TE if is_uniform else logits_TE + self.log_prior_E
        nats_T = logits_TE.new_zeros(x_TD.shape[0])
        number_T = self.number(ctx)
        if number_T is not None:
            target_T = self.level.select_expert(number_T, self.num_experts)
            target_T = target_T.masked_fill(number_T >= self.num_domains, NO_EXPERT)
            nats_T = functional.cross_entropy(logits_TE, target_T, ignore_index=NO_EXPERT, reduction="none")
        if ctx.training:
            return replace(super().forward(x_TD, ctx), token_extras={"nats_T": nats_T})
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        weight_TE = logits_TE.softmax(-1)
        return Routing.from_top_k(expert_TE, weight_TE, num_experts=self.num_experts, token_extras={"nats_T": nats_T})

    @property
    def log_prior_E(self) -> Tensor:
        """Logarithm of each expert's share of training tokens, with one token added to each count."""
        count_E = self.count_E + 1
        return (count_E / count_E.sum()).log().float()

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        most = math.log(max(self.num_experts, 2))
        nats_T = record.routing.token_extras["nats_T"]
        return {"domain": reduce_record(record, lambda mean: mean / most, means=[nats_T])}


def compute_running_means(x_TD: Tensor, ctx: RouteContext) -> Tensor:
    """Return for each token the mean of its sequence's tokens up to and including it, without padding."""
    valid_T = x_TD.new_ones(x_TD.shape[0]) if ctx.valid_T is None else ctx.valid_T.to(x_TD.dtype)
    valid_BL1 = valid_T.view(-1, ctx.sequence_length, 1)
    sum_BLD = (x_TD.view(*valid_BL1.shape[:2], x_TD.shape[-1]) * valid_BL1).cumsum(1)
    return (sum_BLD / valid_BL1.cumsum(1).clamp(min=1)).flatten(0, 1)
