"""Null experts: some of the choices of top-k stand for nothing, so tokens differ in how much they use."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebench.errors import require
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import rank_top_k
from moebench.routing.router import ROUTERS, Causality, Facts, Router, RouterBuildContext, RouterConfig, check_top_k
from moebench.routing.values import LayerRecord, Routing


@ROUTERS.register(
    Facts(
        family="adaptive computation",
        equation="p = softmax(W x) over E + m experts, of the top k those below E are used,  w = p_i / Σ of those",
        paper="arXiv:2406.13233, section 3",
        use="Easy tokens shall use fewer experts than hard ones, on average as many as planned.",
        beware="The balance loss sets the share of null choices on average only. A token whose choices are all "
        "null keeps its residual.",
        causality=Causality(causal=True, reason="each token is routed by its own vector", batch_dependent=False),
        variable_k=True,
        own_losses=("balance_with_nulls",),
    )
)
class NullExperts(Router["NullExperts.Config"]):
    """AdaMoE (Zeng et al. 2024): m null experts that cost nothing take part in top-k.

    The balance loss counts all null experts as alike, at their mean load, so it sets how many choices are null,
    m/(E+m) of them, and leaves open which. Weights are normalised over the true experts: a token with one uses it with
    weight 1, a token with none keeps its residual. Read from a description of the paper.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of null experts."""

        name: str = "null_experts"
        top_k: int = 4
        """Choices of a token, null experts included."""
        null_share: float = 1.0
        """Null experts for each true one: m = E times this, at least 1."""
        losses: dict[str, float] = field(default_factory=lambda: {"balance_with_nulls": 0.01})

    def __init__(self, config: Config, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.num_nulls = max(1, round(context.num_experts * config.null_share))
        self.gate = Gate(context.d_model, context.num_experts + self.num_nulls)
        self.top_k = config.top_k

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return how many of k choices are true experts at an even load."""
        nulls = max(1, round(num_experts * config.null_share))
        return max(1, round(config.top_k * num_experts / (num_experts + nulls)))

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse k outside 2 ... E and a negative share."""
        check_top_k(config.top_k, num_experts, smallest=2, why="at 1 the weight is always 1 and nothing is learned")
        require(0 < config.null_share < 100, "router.null_share", config.null_share, "greater than 0 and below 100")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Choose among all, use the true ones."""
        all_TN = self.gate(x_TD)
        choice_TN = all_TN.softmax(-1)
        expert_TK = rank_top_k(all_TN, self.top_k)
        weight_TK = choice_TN.gather(-1, expert_TK)
        true_TK = expert_TK < self.num_experts
        weight_TK = weight_TK * true_TK
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=1e-20)
        # A choice that is null still needs an expert's number in the list: one that the token does not use otherwise.
        stand_in_TK = _others(expert_TK, true_TK, self.num_experts)
        return (
            Routing.from_top_k(
                torch.where(true_TK, expert_TK, stand_in_TK),
                weight_TK,
                num_experts=self.num_experts,
                logits_TE=all_TN[:, : self.num_experts],
                scores_TE=choice_TN[:, : self.num_experts],
                token_extras={"choice_T": choice_TN, "chosen_T": expert_TK},
            )
            .keep(true_TK.reshape(-1))
            .compact()
        )  # a hole would keep a place that rerouting may need

    def losses(self, record: LayerRecord) -> dict[str, Tensor]:
        """Return (E+m) · Σ f P over all experts, every null expert with the mean f of the null ones."""
        choice_TN, chosen_TK = record.routing.token_extras["choice_T"], record.routing.token_extras["chosen_T"]
        chosen_TN = torch.zeros_like(choice_TN).scatter(1, chosen_TK, 1.0)
        share_N = record.mean(chosen_TN) / self.top_k
        nulls = share_N[self.num_experts :]
        share_N = torch.cat([share_N[: self.num_experts], nulls.mean().expand_as(nulls)])
        return {"balance_with_nulls": share_N.numel() * torch.dot(share_N.detach(), record.mean(choice_TN))}


def _others(expert_TK: Tensor, true_TK: Tensor, num_experts: int) -> Tensor:
    """Return K different experts for each token where a choice is null: the n-th null one gets the n-th unused."""
    used_TE = torch.zeros(expert_TK.shape[0], num_experts, dtype=torch.int64, device=expert_TK.device)
    used_TE = used_TE.scatter_add(1, expert_TK.clamp(max=num_experts - 1), true_TK.long())
    unused_TE = used_TE.argsort(dim=-1, stable=True)
    nth_TK = ((~true_TK).cumsum(-1) - 1).clamp(min=0)
    return unused_TE.gather(1, nth_TK)
