"""Quantile balancing: expert prices set to the quantile of the last step that balances its loads (arXiv:2408.15664).

As in loss-free balancing, a price per expert is subtracted from its scores for selection only. After each step the
price becomes the quantile of the tokens' margins at which the expert would have received exactly its share of tokens.
The quantile update is that of Megatron-LM's router.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.histogram import count_by_expert, empty_histograms, find_value_below_top
from moebench.routing.losses import recount_by_scores, sequence_balance
from moebench.routing.reduction import LossValue
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x),  I = top-k(s - β),  w = s_I;  after each step a_t = (k+1)-th best of s_t - β,"
        "  β_e = (Tk/E + 1)-th largest of s_te - a_t over its T tokens",
        paper="arXiv:2408.15664 (the bias); the quantile update is that of Megatron-LM's router",
        use="As loss_free, when loads must be even within tens of steps.",
        beware="Quantiles of few tokens are noisy: use at least 16 tokens per expert. A balance loss works against it.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector and prices set by past batches only",
            batch_dependent=False,
        ),
        own_losses=("sequence_balance",),
    )
)
class QuantileBalancing(Router["QuantileBalancing.Config"]):
    """As `loss_free`, but the bias is set to its balancing value instead of moving there in small steps.

    Both ascend the dual of one linear program, the best assignment with even loads: loss-free by the sign of its
    gradient, this one by solving for one price at a time. a_t is the score after price of token t's next best expert,
    so expert e is worth s_te - a_t to the token, and its price is the value that all but Tk/E tokens fall short of.
    Megatron-LM averages quantiles over parts of a step; here histograms are summed over the micro-batches and processes
    of a whole step. They count the margins s_te - a_t - β_e in bins that get finer towards 0, so settled prices are
    resolved to the rounding of the scores, even for saturated sigmoids. Prices are shifted to mean 0, because only
    differences matter. `sequence_balance` is computed from the scores without prices, as in `loss_free`.
    """

    price_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of quantile balancing."""

        name: str = "quantile_balancing"
        top_k: int = 2
        """Experts per token."""
        momentum: float = 0.0
        """Weight of the previous prices in an update."""
        renormalise: bool = False
        """Divide the k weights by their sum."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)
        self.register_buffer("price_E", torch.zeros(context.num_experts))

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        return config.top_k

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        why = "at 1 a renormalised weight is always 1; use renormalise=false"
        check_top_k(config.top_k, num_experts, smallest=2 if config.renormalise else 1, why=why)
        require(0 <= config.momentum < 1, "router.momentum", config.momentum, "at least 0 and below 1")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        logits_TE = self.gate(x_TD)
        rule = TopKRule(
            top_k=self.options.top_k,
            score="sigmoid",
            ranks_scores=True,
            weights="shares" if self.options.renormalise else "scores",
        )
        expert_TK, weight_TK, scores_TE = choose_top_k(logits_TE, rule, bias_E=-self.price_E.float())
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        return {"sequence_balance": sequence_balance(recount_by_scores(record, self.options.top_k))}

    @override
    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        scores_TE, top_k = record.routing.scores_TE, self.options.top_k
        assert scores_TE is not None
        if top_k == self.num_experts:  # every expert gets every token: there is no next best expert
            return {"margin_EH": empty_histograms(self.num_experts, scores_TE.device)}
        net_score_TE = scores_TE.detach() - self.price_E.float()
        next_best_T1 = net_score_TE.topk(top_k + 1, dim=-1).values[:, top_k:]
        return {"margin_EH": count_by_expert(net_score_TE - next_best_T1, record.valid_T)}

    @torch.no_grad()
    @override
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        if self.options.top_k == self.num_experts:
            return
        even_load = load_E.sum() / self.num_experts
        quantile_E = self.price_E.double() + find_value_below_top(statistics["margin_EH"], even_load)
        quantile_E = (quantile_E - quantile_E.mean()).to(self.price_E.dtype)
        updated_E = self.options.momentum * self.price_E + (1 - self.options.momentum) * quantile_E
        self.price_E.copy_(updated_E.where(load_E.sum() > 0, self.price_E))
