"""AdaMoE: null experts that compute nothing take part in top-k, so tokens use different numbers of experts.

Paper: arXiv:2406.13233. The gate scores E experts and m null experts; the token uses those of its top k that are not
null, with renormalised weights. A balance loss controls the share of null choices.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.budget import Knob
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.selection import select
from moebench.routing.token_choice import TopKRule, choose_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="p = softmax(W x) over E + m experts, of the top k those below E are used,  w = p_i / Σ of those",
        paper="arXiv:2406.13233, section 3",
        use="When easy tokens should use fewer experts than hard ones, and the mean number is given.",
        beware="The balance loss controls the share of null choices only on average. A token whose choices are all "
        "null keeps its residual.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
        budget=Knob(attribute="null_shift", low=-50.0, high=50.0, unit=-1.0),
        own_losses=("balance_with_nulls",),
    )
)
class NullExperts(Router["NullExperts.Config"]):
    """AdaMoE (Zeng et al. 2024): m null experts, which cost nothing, take part in top-k.

    The balance loss, (E+m) · Σ f P over all experts, gives every null expert the mean load of the null ones, so it
    controls how many choices are null, m/(E+m) of them, and not which. Weights are normalised over the real experts: a
    token with one uses it with weight 1, a token with none keeps its residual. Implemented from a description of the
    paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of null experts."""

        name: str = "null_experts"
        top_k: int = 4
        """Choices per token, null experts included."""
        null_share: float = 1.0
        """Null experts per real expert: m = E times this, at least 1."""
        losses: dict[str, float] = field(default_factory=lambda: {"balance_with_nulls": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_nulls = max(1, round(context.num_experts * config.null_share))
        self.gate = Gate(context.d_model, context.num_experts + self.num_nulls)
        self.top_k = config.top_k
        self.null_shift = 0.0
        """Added to the logits of the null experts."""

    @classmethod
    @override
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        num_nulls = max(1, round(num_experts * config.null_share))
        return max(1, round(config.top_k * num_experts / (num_experts + num_nulls)))

    @classmethod
    @override
    def check(cls, config: Config, num_experts: int) -> None:
        check_top_k(
            config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and the router learns nothing"
        )
        require(0 < config.null_share < 100, "router.null_share", config.null_share, "greater than 0 and below 100")

    @override
    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        is_null_N = torch.arange(self.gate.weight_ED.shape[0], device=x_TD.device) >= self.num_experts
        logits_TN = self.gate(x_TD) + self.null_shift * is_null_N
        expert_TK, weight_TK, choice_TN = choose_top_k(logits_TN, TopKRule(top_k=self.top_k))
        is_real_TK = expert_TK < self.num_experts
        weight_TK = weight_TK * is_real_TK
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        # A null choice needs some expert index in the list: one that the token does not use.
        placeholder_TK = _fill_unused(expert_TK, is_real_TK, self.num_experts)
        routing = Routing.from_top_k(
            torch.where(is_real_TK, expert_TK, placeholder_TK),
            weight_TK,
            num_experts=self.num_experts,
            logits_TE=logits_TN[:, : self.num_experts],
            scores_TE=choice_TN[:, : self.num_experts],
            token_extras={"choice_T": choice_TN, "chosen_T": expert_TK},
        )
        return select(routing, is_real_TK.reshape(-1))

    @override
    def losses(self, record: LayerRecord) -> dict[str, LossValue]:
        choice_TN, chosen_TK = record.routing.token_extras["choice_T"], record.routing.token_extras["chosen_T"]
        chosen_TN = torch.zeros_like(choice_TN).scatter(1, chosen_TK, 1.0)

        def formula(chosen_N: Tensor, choice_N: Tensor) -> Tensor:
            share_N = chosen_N / self.top_k
            null_share_M = share_N[self.num_experts :]
            share_N = torch.cat([share_N[: self.num_experts], null_share_M.mean().expand_as(null_share_M)])
            return share_N.numel() * torch.dot(share_N.detach(), choice_N)

        return {"balance_with_nulls": reduce_record(record, formula, means=[chosen_TN, choice_TN])}


def _fill_unused(expert_TK: Tensor, is_real_TK: Tensor, num_experts: int) -> Tensor:
    """Return K different experts for each token where choices are null: the n-th null one gets the n-th unused."""
    used_TE = torch.zeros(expert_TK.shape[0], num_experts, dtype=torch.int64, device=expert_TK.device)
    used_TE = used_TE.scatter_add(1, expert_TK.clamp(max=num_experts - 1), is_real_TK.long())
    unused_TE = used_TE.argsort(dim=-1, stable=True)
    nth_TK = ((~is_real_TK).cumsum(-1) - 1).clamp(min=0)
    return unused_TE.gather(1, nth_TK)
