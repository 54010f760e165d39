"""Quantile balancing: the price of an expert is the quantile at which last step's tokens would have filled it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.histogram import count_by_expert, empty_counts, value_below_top
from moebench.routing.losses import counted_by_scores, sequence_balance
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x),  I = top-k(s - β),  w = s_I;  after each step a_t = (k+1)-th best of s_t - β,"
        "  β_e = (Tk/E + 1)-th largest of s_te - a_t over its T tokens",
        paper="arXiv:2408.15664 (the bias); the quantile update is that of Megatron-LM's router",
        use="As loss_free, where loads must be even within tens of steps.",
        beware="Quantiles of few tokens jump: it wants some 16 tokens for each expert. Balance losses beside it "
        "pull against it.",
        causality=Causality(
            causal=True,
            reason="each token is routed by its own vector and prices that only past batches have set",
            batch_dependent=False,
        ),
        own_losses=("sequence_balance",),
    )
)
class QuantileBalancing(Router["QuantileBalancing.Config"]):
    """As `loss_free`, but the bias jumps to where it balances instead of creeping there.

    Both climb the dual of one linear program, the best assignment at even loads: loss-free by the sign of its
    gradient, this by solving for one price at a time. a_t is what a token's next best choice would have given it, so
    expert e is worth s_te - a_t to the token, and its price is what all but Tk/E tokens would refuse. Megatron-LM
    averages the quantiles of parts of a step; here histograms of the whole step are added up over micro-batches and
    processes. They are of the margins s_te - a_t - β_e, in bins that get finer towards 0: where prices settle they are
    resolved to the rounding of the scores, however close together saturated sigmoids lie. Prices are kept at mean 0:
    only differences matter. Steady only with some 16 tokens or more for each expert.
    """

    price_E: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of quantile balancing."""

        name: str = "quantile_balancing"
        top_k: int = 2
        """Experts per token."""
        momentum: float = 0.0
        """Share of the old prices that stays in a step."""
        renormalise: bool = False
        """Divide the k weights by their sum."""

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.options = config
        self.gate = Gate(context.d_model, context.num_experts)
        self.register_buffer("price_E", torch.zeros(context.num_experts))

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return k."""
        return config.top_k

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 1 ... E, k=1 with weights that are always 1, and a momentum that never moves."""
        why = "at 1 a renormalised weight is always 1; use renormalise=false"
        check_top_k(config.top_k, num_experts, smallest=2 if config.renormalise else 1, why=why)
        require(0 <= config.momentum < 1, "router.momentum", config.momentum, "at least 0 and below 1")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to the k experts with the highest scores after their price, weighed by the scores."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.sigmoid()
        expert_TK = rank_top_k(scores_TE - self.price_E.float(), self.options.top_k, quantum=SCORE_QUANTUM)
        weight_TK = scores_TE.gather(-1, expert_TK)
        if self.options.renormalise:
            weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        return Routing.from_top_k(
            expert_TK, weight_TK, num_experts=self.num_experts, logits_TE=logits_TE, scores_TE=scores_TE
        )

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return `sequence_balance` of the scores: prices must not make them look even to the loss."""
        return {"sequence_balance": sequence_balance(counted_by_scores(record, self.options.top_k))}

    def statistics(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return for each expert how many tokens were how far above its price: a histogram, int64 [E, bins]."""
        scores_TE, top_k = record.routing.scores_TE, self.options.top_k
        assert scores_TE is not None
        if top_k == self.num_experts:  # there is no next best: all experts have every token
            return {"margin_EH": empty_counts(self.num_experts, scores_TE.device)}
        paid_TE = scores_TE.detach() - self.price_E.float()
        next_best_T1 = paid_TE.topk(top_k + 1, dim=-1).values[:, top_k:]
        return {"margin_EH": count_by_expert(paid_TE - next_best_T1, record.valid_T)}

    @torch.no_grad()
    def after_step(self, load_E: Tensor, statistics: Mapping[str, Tensor]) -> None:
        """Set each price to the worth of the first token that an expert with an even load would turn away."""
        if self.options.top_k == self.num_experts:
            return
        even_load = load_E.sum() / self.num_experts
        price_E = self.price_E.double() + value_below_top(statistics["margin_EH"], even_load)
        price_E = (price_E - price_E.mean()).to(self.price_E.dtype)
        moved_E = self.options.momentum * self.price_E + (1 - self.options.momentum) * price_E
        self.price_E.copy_(moved_E.where(load_E.sum() > 0, self.price_E))
