"""Quantile balancing: the price of an expert is the quantile at which last step's tokens would have filled it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k
from moebench.routing.router import ROUTERS, Facts, Router, RouterConfig, Site, check_top_k
from moebench.routing.values import LayerRecord, Routing

BINS = 2000
"""Of the histogram over [-1, 1], in which differences of two sigmoids lie: a resolution of 0.001."""


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="s = σ(W x),  I = top-k(s - β),  w = s_I;  after each step a_t = (k+1)-th best of s_t - β,"
        "  β_e = (Tk/E + 1)-th largest of s_te - a_t over its T tokens",
        paper="arXiv:2408.15664 (the bias); the quantile update is that of Megatron-LM's router",
        use="As loss_free, where loads must be even within tens of steps.",
        beware="Quantiles of few tokens jump: it wants some 16 tokens for each expert. Balance losses beside it "
        "pull against it.",
        causal=True,
        causal_reason="each token is routed by its own vector and prices that only past batches have set",
        batch_dependent=False,
    )
)
class QuantileBalancing(Router):
    """As `loss_free`, but the bias jumps to where it balances instead of creeping there.

    Both climb the dual of one linear program, the best assignment at even loads: loss-free by the sign of its
    gradient, this by solving for one price at a time. a_t is what a token's next best choice would have given it, so
    expert e is worth s_te - a_t to the token, and its price is what all but Tk/E tokens would refuse. The histograms
    of a whole step add up over micro-batches and processes, where Megatron-LM averages the quantiles of parts.
    Prices are kept at mean 0: only differences matter. Steady only with some 16 tokens or more for each expert.
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

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        self.options = config
        self.gate = Gate(site.d_model, site.num_experts)
        self.register_buffer("price_E", torch.zeros(site.num_experts))

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

    def sums(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return for each expert how many tokens it was worth how much: a histogram of s_te - a_t, [E, bins]."""
        scores_TE, top_k = record.routing.scores_TE, self.options.top_k
        assert scores_TE is not None
        count_EH = torch.zeros(self.num_experts, BINS, dtype=torch.int64, device=scores_TE.device)
        if top_k == self.num_experts:
            return {"worth_EH": count_EH}  # there is no next best: all experts have every token
        next_best_T1 = (scores_TE - self.price_E.float()).topk(top_k + 1, dim=-1).values[:, top_k:]
        bin_TE = ((scores_TE - next_best_T1 + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
        one_TE = torch.ones_like(bin_TE)
        if record.valid_T is not None:
            one_TE = one_TE * record.valid_T.unsqueeze(-1)
        return {"worth_EH": count_EH.scatter_add(1, bin_TE.T, one_TE.T)}

    @torch.no_grad()
    def after_step(self, load_E: Tensor, sums: Mapping[str, Tensor]) -> None:
        """Set each price to the worth of the first token that an expert with an even load would turn away."""
        if self.options.top_k == self.num_experts:
            return
        even_load = load_E.sum() / self.num_experts
        above_EH = sums["worth_EH"].flip(-1).cumsum(-1)
        from_top_E = (above_EH <= even_load).sum(-1).clamp(max=BINS - 1)
        price_E = 1 - (from_top_E + 0.5) * (2 / BINS)  # the middle of the bin
        price_E = (price_E - price_E.mean()).to(self.price_E.dtype)
        moved_E = self.options.momentum * self.price_E + (1 - self.options.momentum) * price_E
        self.price_E.copy_(moved_E.where(load_E.sum() > 0, self.price_E))
