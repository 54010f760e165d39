"""Expert choice: each expert selects the tokens that it scores highest (arXiv:2202.09368, 2310.15961).

A softmax over experts scores every token. Within a group of tokens (the batch, each sequence, or each position across
sequences) every expert takes the same number of its best tokens, weighted by the scores. Loads are even by
construction; a token gets any number of experts, possibly none.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.assignment import solve_capped_plan
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.logit_router import LogitRouter
from moebench.routing.ranking import log_scores, rank_top_k, take_best_tokens
from moebench.routing.router import (
    ROUTERS,
    Causality,
    Facts,
    RouterBuildContext,
    RouterConfig,
    RouterTraits,
    check_top_k,
)
from moebench.routing.values import Routing

EXCLUDED = -torch.inf
"""Ranking value of a token that an expert may not take."""


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W) over experts;  I_e = the T·c/E best tokens of e;  y_t = Σ_{e: t∈I_e} S_te E_e(x_t)",
        paper="arXiv:2202.09368, section 3.2",
        use="In encoders, vision and speech: loads are even without a loss, and tokens that need more experts can get "
        "them.",
        beware="It is not causal, so it does not suit autoregressive language models. Some tokens get no expert. In "
        "small batches the choice depends strongly on the other sequences.",
        causality=Causality(
            causal=False,
            reason="whether an expert takes a token depends on later tokens of the same sequence",
            batch_dependent=True,
        ),
        balanced=True,
        variable_k=True,
    )
)
class ExpertChoice(LogitRouter["ExpertChoice.Config"]):
    """Each expert takes the same number of tokens; a token gets none, one or several experts (Zhou et al. 2022).

    Balanced by construction and without a loss, but not causal: a causal task refuses it unless allow_noncausal is set,
    and then every table marks it. Padding is never selected.

    `max_per_token` caps the experts of a token (section 3.3 there): experts choose by the entropy-regularised plan
    A = argmax <S, A> + λ H(A), in which no token exceeds the cap. The paper rounds the plan by top-C alone and may
    exceed it; here experts choose only among each token's best entries of the plan, so the cap is exact and an expert
    may get fewer tokens than its capacity.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of expert choice."""

        name: str = "expert_choice"
        average_experts: int = 2
        """Average number c of experts per token; each expert takes T·c/E tokens (at least 1)."""
        group: Literal["batch", "sequence"] = "batch"
        """Group of tokens that an expert chooses among: the whole batch (the paper) or each sequence."""
        max_per_token: int | None = None
        """Maximum number of experts per token; null: no cap."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.average_experts: int = config.average_experts
        self.group: str = config.group
        self.max_per_token: int | None = config.max_per_token

    @classmethod
    @override
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        return int(config.average_experts)

    @classmethod
    @override
    def check(cls, config: Any, num_experts: int) -> None:
        check_top_k(config.average_experts, num_experts, key="average_experts")
        cap, average = config.max_per_token, config.average_experts
        allowed = f"null or at least average_experts={average}"
        require(cap is None or cap >= average, "router.max_per_token", cap, allowed)

    @property
    @override
    def traits(self) -> RouterTraits:
        return replace(super().traits, needs_whole_batch=self.group != "sequence")

    @override
    def score_tokens(self, x_TD: Tensor, ctx: RouteContext) -> Tensor:
        logits_TE: Tensor = self.gate(x_TD)
        return logits_TE

    @override
    def assign(self, logits_TE: Tensor, ctx: RouteContext) -> Routing:
        num_tokens = logits_TE.shape[0]
        device = logits_TE.device
        scores_TE = logits_TE.softmax(-1)
        token_GT = self._group_tokens(num_tokens, ctx.sequence_length).to(device)
        max_capacity = self._capacity(token_GT.shape[1]) if num_tokens else 0
        capacity_G = self._count_slots(token_GT, ctx.valid_T)
        ranked_GTE = self._rank_tokens(scores_TE.detach()[token_GT], capacity_G, ctx.valid_T, token_GT)
        index_GCE = take_best_tokens(ranked_GTE, max_capacity, capacity_G)
        taken_GEC = token_GT.unsqueeze(1).expand(-1, self.num_experts, -1).gather(2, index_GCE.transpose(1, 2))
        token_N = taken_GEC.transpose(1, 2).reshape(-1)
        expert_N = torch.arange(self.num_experts, device=device).expand(index_GCE.shape).reshape(-1)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=scores_TE[token_N, expert_N],
            num_tokens=num_tokens,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
        if self._fills_capacity and ctx.valid_T is None:
            return routing
        is_slot_GC = torch.arange(max_capacity, device=device) < capacity_G.unsqueeze(1)
        best_GCE = ranked_GTE.gather(1, index_GCE)
        return routing.keep(((best_GCE > EXCLUDED) & is_slot_GC.unsqueeze(-1)).reshape(-1))

    @property
    def _fills_capacity(self) -> bool:
        """Whether every expert fills its capacity for any scores."""
        return self.max_per_token is None

    def _group_tokens(self, num_tokens: int, sequence_length: int) -> Tensor:
        """Return the tokens of each group, int64 [G, tokens per group]."""
        size = max(sequence_length if self.group == "sequence" else num_tokens, 1)
        return torch.arange(num_tokens).view(-1, size)

    def _rank_tokens(self, scores_GTE: Tensor, capacity_G: Tensor, valid_T: Tensor | None, token_GT: Tensor) -> Tensor:
        """Return the value by which each expert ranks the tokens of its group; EXCLUDED for those it may not take."""
        valid_GT1 = None if valid_T is None else valid_T[token_GT].unsqueeze(-1)
        ranked_GTE = log_scores(scores_GTE)
        if self.max_per_token is not None:
            ranked_GTE = solve_capped_plan(scores_GTE, capacity_G, self.max_per_token, valid_GT1)
            ranked_GTE = keep_best_experts(ranked_GTE, self.max_per_token)
        return ranked_GTE if valid_GT1 is None else ranked_GTE.masked_fill(~valid_GT1, EXCLUDED)

    def _capacity(self, num_tokens: int) -> int:
        return min(num_tokens, max(1, num_tokens * self.average_experts // self.num_experts))

    def _count_slots(self, token_GT: Tensor, valid_T: Tensor | None) -> Tensor:
        """Return the number of tokens that each expert takes from a group: its share of the valid tokens."""
        num_groups, size = token_GT.shape
        if valid_T is None:
            return torch.full((num_groups,), self._capacity(size), device=token_GT.device)
        num_valid_G = valid_T[token_GT].sum(1)
        capacity_G: Tensor = (num_valid_G * self.average_experts // self.num_experts).clamp(min=1).minimum(num_valid_G)
        return capacity_G


def keep_best_experts(ranked_GTE: Tensor, num_kept: int) -> Tensor:
    """Return the ranking values with all but the best `num_kept` experts of each token EXCLUDED."""
    best_GTK = rank_top_k(ranked_GTE, min(num_kept, ranked_GTE.shape[-1]))
    is_kept_GTE = torch.zeros_like(ranked_GTE, dtype=torch.bool).scatter(-1, best_GTK, True)
    return ranked_GTE.masked_fill(~is_kept_GTE, EXCLUDED)


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W) over experts;  at each position, I_e = the B·c/E best tokens of e among B sequences",
        paper="arXiv:2310.15961, section 3 (groups across examples); expert choice: arXiv:2202.09368",
        use="For expert choice in a language model: no token can see later ones.",
        beware="Other sequences of the batch affect the choice, in evaluation too, so a sequence alone is routed "
        "differently. With fewer than E/c sequences every token has more experts than planned.",
        causality=Causality(
            causal=True,
            reason="a token competes only with tokens at the same position of other sequences",
            batch_dependent=True,
            with_capacity=False,  # later tokens of earlier sequences may take a slot
        ),
        balanced=True,
        variable_k=True,
    )
)
class ExpertChoiceByPosition(ExpertChoice):
    """Expert choice among the tokens at the same position of all sequences, which makes it causal.

    The grouping of Mixture of Tokens with the selection of expert choice. An expert takes at least one token of each
    position, so the loads are those of c experts per token only if the batch has at least E/c sequences. Evaluation
    depends on the sequences of the batch.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ExpertChoice.Config):
        """Options of expert choice by position."""

        name: str = "expert_choice_by_position"
        group: Literal["position"] = "position"  # type: ignore[assignment]
        """Group of tokens that an expert chooses among: those at the same position of all sequences."""

    @override
    def _group_tokens(self, num_tokens: int, sequence_length: int) -> Tensor:
        return torch.arange(num_tokens).view(-1, sequence_length).T
