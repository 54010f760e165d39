"""DEMix with unknown domains: experts mixed by how probable each domain is for the text so far."""

import math
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Causality, Facts, RouterBuildContext, RouterConfig
from moebench.routing.routers.domain import Domain
from moebench.routing.values import LayerRecord, Routing

NONE = -100
"""No expert."""


@ROUTERS.register(
    Facts(
        family="static",
        equation="training: y = E_d(x_t), d the domain;  evaluation: y = Σ_e p_e E_e(x_t), p = softmax(W x̄_t + ln π),"
        "  x̄_t = mean_{s≤t} sg(x_s)",
        paper="arXiv:2108.05036, section 5 (mixing experts by a posterior over domains)",
        use="Experts of known domains, used where the domain of a text is not known.",
        beware="Evaluation uses all experts and costs as much. The posterior needs some tokens before it knows "
        "the domain. Experts are mixed layer by layer, not the predictions of whole models as in DEMix.",
        causality=Causality(
            causal=True, reason="the posterior depends on the tokens up to this one", batch_dependent=False
        ),
        trained_by_own_loss=("gate",),
        makes_scores=False,
        own_losses=("domain",),
        variable_k=True,
    )
)
class DomainPosterior(Domain):
    """`domain` in training; in evaluation nobody says the domain, and all experts are mixed by a posterior over it.

    DEMix takes the posterior from Bayes' rule: the prior times the likelihood of the text so far under the model with
    each expert, which needs E forward passes of the whole model and cannot be had inside a layer. Here every layer has
    a classifier of its own on the mean of its input so far, trained to name the expert of the domain (loss `domain`);
    no gradient of that loss reaches the network below, none of the task's loss the classifier. So the posterior is
    discriminative, from what the layer sees and not from how well each expert predicts. DEMix mixes the next-token
    probabilities of whole passes, one with each expert; here each layer adds up its experts' outputs, which is surer
    where experts disagree: logits (4, 0) and (0, 0) with weights of 1/2 give .881 so, and as probabilities .741. As in
    the paper the prior is a factor of its own: π counts training tokens, the classifier is trained on top of it, and
    evaluation may take another. All experts compute all tokens in evaluation; in training one does, and
    there alone is it matched.

    Domains that were held out of training are served in the same way, by the experts of those that they resemble: what
    the paper's mixture is for.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of domain routing by a posterior."""

        name: str = "domain_posterior"
        prior: Literal["counted", "even"] = "counted"
        """Prior (π) in evaluation: the share of training tokens that each expert saw, or even (where the domains
        of the evaluation come in other shares than those of training)."""
        losses: dict[str, float] = field(default_factory=lambda: {"domain": 0.1})

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(Domain.Config(name=config.name), context)
        self.config, self.prior = config, config.prior
        self.gate = Gate(context.d_model, context.num_experts)

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the expert of its domain in training, and to all by the posterior in evaluation."""
        even = not ctx.training and self.prior == "even"
        logits_TE = self.gate(mean_so_far(x_TD.detach().float(), ctx))
        logits_TE = logits_TE if even else logits_TE + self.log_prior_E
        nats_T = logits_TE.new_zeros(x_TD.shape[0])
        if ctx.domain_T is not None:
            own_T = self.level.expert_of(ctx.domain_T, self.num_experts)
            # A domain that was held out of training has no expert to be named.
            own_T = own_T.masked_fill(ctx.domain_T >= self.num_domains, NONE)
            nats_T = functional.cross_entropy(logits_TE, own_T, ignore_index=NONE, reduction="none")
        if ctx.training:
            return replace(super().forward(x_TD, ctx), token_extras={"nats_T": nats_T})
        expert_TE = torch.arange(self.num_experts, device=x_TD.device).expand(x_TD.shape[0], -1)
        weight_TE = logits_TE.softmax(-1)
        return Routing.from_top_k(expert_TE, weight_TE, num_experts=self.num_experts, token_extras={"nats_T": nats_T})

    @property
    def log_prior_E(self) -> Tensor:
        """Logarithm of the share of training tokens; one token more for each expert, or none could ever be new."""
        count_E = self.count_E + 1
        return (count_E / count_E.sum()).log().float()

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return the classifier's cross-entropy over ln E: 1 when all experts are equally probable, 0 when sure."""
        nats = record.mean(record.routing.token_extras["nats_T"])
        return {"domain": nats / math.log(max(self.num_experts, 2))}


def mean_so_far(x_TD: Tensor, ctx: RouteContext) -> Tensor:
    """Return for each token the mean of its sequence's tokens up to it, itself included and padding left out."""
    valid_T = x_TD.new_ones(x_TD.shape[0]) if ctx.valid_T is None else ctx.valid_T.to(x_TD.dtype)
    valid_BL1 = valid_T.view(-1, ctx.sequence_length, 1)
    sum_BLD = (x_TD.view(*valid_BL1.shape[:2], x_TD.shape[-1]) * valid_BL1).cumsum(1)
    return (sum_BLD / valid_BL1.cumsum(1).clamp(min=1)).flatten(0, 1)
