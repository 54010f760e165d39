"""GShard top-2: the best expert always, the second in proportion to its weight."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Facts, Router, RouterConfig, Site, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="token choice",
        equation="p = softmax(W x),  g = (p_1, p_2) / (p_1 + p_2),  second kept with probability min(1, g_2 / τ)",
        paper="arXiv:2006.16668, section 2.2 and algorithm 1",
        causal=True,
        causal_reason="dropless, each token is routed by its own vector",
        batch_dependent=False,
        causal_with_capacity=False,  # an early token's second choice queues behind later tokens' first choices
        own_losses=("first_choice_balance",),
    )
)
class GShard(Router):
    """Top-2 token choice (Lepikhin et al. 2020), weights normalised before any drop.

    The balance loss counts first choices only, as the paper does, in our normalisation (1 at uniform; the
    paper's E² · mean is the same number). Policy `random` thins the second expert in training and, unlike
    implementations that sample in evaluation too, keeps it always in evaluation.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of GShard."""

        name: str = "gshard"
        second_expert: Literal["all", "random"] = "random"
        """all: always keep the second expert; random: keep it with probability min(1, g_2 / threshold)."""
        threshold: float = 0.2
        """A second weight of at least this is always kept (policy random)."""
        losses: dict[str, float] = field(default_factory=lambda: {"first_choice_balance": 0.01})

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        self.gate = Gate(site.d_model, site.num_experts)
        self.second_expert = config.second_expert
        self.threshold = config.threshold

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return 2."""
        return 2

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse fewer than two experts and a threshold that keeps or drops all."""
        check_top_k(2, num_experts, smallest=2)
        require(0 < config.threshold < math.inf, "router.threshold", config.threshold, "greater than 0 and finite")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Send each token to its best expert and, by the policy, to its second best."""
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        best_TK, expert_TK = scores_TE.topk(2, dim=-1)
        weight_TK = best_TK / best_TK.sum(-1, keepdim=True)
        # All first choices before all second choices, each by position.
        num_tokens = x_TD.shape[0]
        behind_K = torch.tensor([0, ctx.batch_tokens(num_tokens)], device=x_TD.device)
        rank_TK = -behind_K - ctx.position_T(num_tokens).unsqueeze(-1)
        routing = Routing.from_top_k(
            expert_TK,
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
            priority_TK=rank_TK,
            extras={"first_T": expert_TK[:, 0]},
        )
        if not ctx.training or self.second_expert == "all":
            return routing
        second_T = weight_TK[:, 1] > ctx.uniform(num_tokens) * self.threshold
        return routing.keep(torch.stack([torch.ones_like(second_T), second_T], dim=-1).reshape(-1))

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return E · Σ f_e P_e with f counted over first choices."""
        routing = record.routing
        scores_TE = routing.scores_TE
        assert scores_TE is not None
        first_TE = torch.nn.functional.one_hot(routing.extras["first_T"], self.num_experts).to(scores_TE.dtype)
        return {"first_choice_balance": self.num_experts * torch.dot(record.mean(first_TE), record.mean(scores_TE))}
