"""Expert choice: each expert picks the tokens it scores highest."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.router import ROUTERS, Facts, Router, RouterConfig, Site, check_top_k
from moebench.routing.values import Routing


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W) over experts;  I_e = the T·c/E best tokens of e;  y_t = Σ_{e: t∈I_e} S_te E_e(x_t)",
        paper="arXiv:2202.09368, section 3.2",
        causal=False,
        causal_reason="whether an expert takes a token depends on later tokens of the same sequence",
        batch_dependent=True,
    )
)
class ExpertChoice(Router):
    """Each expert takes the same number of tokens; a token gets none, one or several experts (Zhou et al. 2022).

    Perfectly balanced by construction and without any loss, but not causal: in a decoder it sees the future, so a
    causal task refuses it unless allow_noncausal is set, and then every table marks it. Padding is never taken.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of expert choice."""

        name: str = "expert_choice"
        average_experts: int = 2
        """c: experts per token on average; each expert takes T·c/E tokens (at least 1)."""
        group: Literal["batch", "sequence"] = "batch"
        """Among which tokens an expert chooses: the whole batch (the paper) or each sequence on its own."""

    def __init__(self, config: Config, site: Site) -> None:
        super().__init__(config, site)
        self.gate = Gate(site.d_model, site.num_experts)
        self.average_experts = config.average_experts
        self.group = config.group

    @classmethod
    def experts_per_token(cls, config: Config, num_experts: int) -> int:
        """Return c, the average."""
        return config.average_experts

    @classmethod
    def check(cls, config: Config, num_experts: int) -> None:
        """Refuse c outside 1 ... E."""
        check_top_k(config.average_experts, num_experts, key="average_experts")

    @property
    def needs_whole_batch(self) -> bool:
        """An expert chooses among the tokens of all sequences unless its group is the sequence."""
        return self.group == "batch"

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Let each expert take its best tokens within each group."""
        num_tokens = x_TD.shape[0]
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        group_size = max(ctx.sequence_length if self.group == "sequence" else num_tokens, 1)
        ranked_TE = scores_TE if ctx.valid_T is None else scores_TE.masked_fill(~ctx.valid_T[:, None], -1.0)
        ranked_GTE = ranked_TE.view(-1, group_size, self.num_experts)
        capacity = self._capacity(group_size) if num_tokens else 0
        taken_GCE = ranked_GTE.topk(capacity, dim=1).indices  # from the best to the worst
        start_G11 = torch.arange(len(ranked_GTE), device=x_TD.device).view(-1, 1, 1) * group_size
        token_N = (taken_GCE + start_G11).reshape(-1)
        expert_N = torch.arange(self.num_experts, device=x_TD.device).expand(taken_GCE.shape).reshape(-1)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=scores_TE[token_N, expert_N],
            num_tokens=num_tokens,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
        return routing if ctx.valid_T is None else routing.keep(self._within_valid(taken_GCE, ctx.valid_T, token_N))

    def _capacity(self, num_tokens: int) -> int:
        return min(num_tokens, max(1, num_tokens * self.average_experts // self.num_experts))

    def _within_valid(self, taken_GCE: Tensor, valid_T: Tensor, token_N: Tensor) -> Tensor:
        """Return which choices stand when an expert's share is one of a group's valid tokens, not of its places."""
        num_valid_G = valid_T.view(taken_GCE.shape[0], -1).sum(1)
        capacity_G = torch.tensor([self._capacity(n) for n in num_valid_G.tolist()], device=valid_T.device)
        place_C = torch.arange(taken_GCE.shape[1], device=valid_T.device)
        within_GC = place_C < capacity_G.unsqueeze(1)
        return within_GC.unsqueeze(-1).expand(taken_GCE.shape).reshape(-1) & valid_T[token_N]
