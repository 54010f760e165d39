"""Expert choice: each expert picks the tokens it scores highest."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import require
from moebench.routing.assignment import capped_plan
from moebench.routing.context import RouteContext
from moebench.routing.gate import Gate
from moebench.routing.ranking import log_scores, rank_top_k, take_best_tokens
from moebench.routing.router import (
    ROUTERS,
    Causality,
    Facts,
    Router,
    RouterBuildContext,
    RouterConfig,
    RouterTraits,
    check_top_k,
)
from moebench.routing.values import Routing

OUT = -torch.inf
"""Rank of a token that an expert may not take."""


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W) over experts;  I_e = the T·c/E best tokens of e;  y_t = Σ_{e: t∈I_e} S_te E_e(x_t)",
        paper="arXiv:2202.09368, section 3.2",
        use="Encoders, vision and speech: even loads without a loss, and more experts for tokens that need them.",
        beware="It sees later tokens, so language models that generate must not use it. Some tokens get no "
        "expert. In small batches the choice depends much on which sequences stand side by side.",
        causality=Causality(
            causal=False,
            reason="whether an expert takes a token depends on later tokens of the same sequence",
            batch_dependent=True,
        ),
        balanced=True,
        variable_k=True,
    )
)
class ExpertChoice(Router["ExpertChoice.Config"]):
    """Each expert takes the same number of tokens; a token gets none, one or several experts (Zhou et al. 2022).

    Perfectly balanced by construction and without any loss, but not causal: in a decoder it sees the future, so a
    causal task refuses it unless allow_noncausal is set, and then every table marks it. Padding is never taken.

    `max_per_token` caps the experts of one token (section 3.3 there): experts choose by an entropic plan of the scores
    in which no token has more, A = argmax <S, A> + λ H(A). The paper rounds the plan by top-C alone and may exceed the
    cap; here a token's best entries of the plan are all that experts choose among, so the cap is exact and an expert
    may go short.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(RouterConfig):
        """Options of expert choice."""

        name: str = "expert_choice"
        average_experts: int = 2
        """c: experts per token on average; each expert takes T·c/E tokens (at least 1)."""
        group: Literal["batch", "sequence"] = "batch"
        """Among which tokens an expert chooses: the whole batch (the paper) or each sequence on its own."""
        max_per_token: int | None = None
        """Most experts of one token; null: no cap."""

    def __init__(self, config: Any, context: RouterBuildContext) -> None:
        super().__init__(config, context)
        self.gate = Gate(context.d_model, context.num_experts)
        self.average_experts: int = config.average_experts
        self.group: str = config.group
        self.max_per_token: int | None = config.max_per_token

    @classmethod
    def experts_per_token(cls, config: Any, num_experts: int) -> int:
        """Return c, the average."""
        return int(config.average_experts)

    @classmethod
    def check(cls, config: Any, num_experts: int) -> None:
        """Refuse c outside 1 ... E, and a cap below it."""
        check_top_k(config.average_experts, num_experts, key="average_experts")
        cap, least = config.max_per_token, config.average_experts
        require(cap is None or cap >= least, "router.max_per_token", cap, f"null or at least average_experts={least}")

    @property
    @override
    def traits(self) -> RouterTraits:
        # An expert chooses among the tokens of all sequences unless its group is the sequence.
        return replace(super().traits, needs_whole_batch=self.group != "sequence")

    def forward(self, x_TD: Tensor, ctx: RouteContext) -> Routing:
        """Let each expert take its best tokens within each group."""
        num_tokens = x_TD.shape[0]
        logits_TE = self.gate(x_TD)
        scores_TE = logits_TE.softmax(-1)
        token_GT = self._groups(num_tokens, ctx.sequence_length).to(x_TD.device)
        capacity = self._capacity(token_GT.shape[1]) if num_tokens else 0
        seats_G = self._seats(token_GT, ctx.valid_T)
        ranked_GTE = self._ranked(scores_TE.detach()[token_GT], seats_G, ctx.valid_T, token_GT)
        place_GCE = take_best_tokens(ranked_GTE, capacity, seats_G)
        taken_GEC = token_GT.unsqueeze(1).expand(-1, self.num_experts, -1).gather(2, place_GCE.transpose(1, 2))
        token_N = taken_GEC.transpose(1, 2).reshape(-1)
        expert_N = torch.arange(self.num_experts, device=x_TD.device).expand(place_GCE.shape).reshape(-1)
        routing = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=scores_TE[token_N, expert_N],
            num_tokens=num_tokens,
            num_experts=self.num_experts,
            logits_TE=logits_TE,
            scores_TE=scores_TE,
        )
        if self._takes_all_places and ctx.valid_T is None:
            return routing
        within_GC = torch.arange(capacity, device=x_TD.device) < seats_G.unsqueeze(1)
        best_GCE = ranked_GTE.gather(1, place_GCE)
        return routing.keep(((best_GCE > OUT) & within_GC.unsqueeze(-1)).reshape(-1))

    @property
    def _takes_all_places(self) -> bool:
        """Whether an expert finds a token for each of its places, whatever the scores."""
        return self.max_per_token is None

    def _groups(self, num_tokens: int, sequence_length: int) -> Tensor:
        """Return the tokens of each group, int64 [G, tokens of a group]."""
        size = max(sequence_length if self.group == "sequence" else num_tokens, 1)
        return torch.arange(num_tokens).view(-1, size)

    def _ranked(self, scores_GTE: Tensor, seats_G: Tensor, valid_T: Tensor | None, token_GT: Tensor) -> Tensor:
        """Return by what each expert ranks the tokens of its group; OUT for those that it may not take."""
        valid_GT1 = None if valid_T is None else valid_T[token_GT].unsqueeze(-1)
        ranked_GTE = log_scores(scores_GTE)
        if self.max_per_token is not None:
            ranked_GTE = capped_plan(scores_GTE, seats_G, self.max_per_token, valid_GT1)
            ranked_GTE = best_of_each_token(ranked_GTE, self.max_per_token)
        return ranked_GTE if valid_GT1 is None else ranked_GTE.masked_fill(~valid_GT1, OUT)

    def _capacity(self, num_tokens: int) -> int:
        return min(num_tokens, max(1, num_tokens * self.average_experts // self.num_experts))

    def _seats(self, token_GT: Tensor, valid_T: Tensor | None) -> Tensor:
        """Return how many tokens each expert takes from a group: its share of the valid ones, not of all places."""
        num_groups, size = token_GT.shape
        if valid_T is None:
            return torch.full((num_groups,), self._capacity(size), device=token_GT.device)
        num_valid_G = valid_T[token_GT].sum(1)
        seats_G: Tensor = (num_valid_G * self.average_experts // self.num_experts).clamp(min=1).minimum(num_valid_G)
        return seats_G


def best_of_each_token(ranked_GTE: Tensor, number: int) -> Tensor:
    """Return the ranks with all but the best `number` experts of each token OUT."""
    best_GTK = rank_top_k(ranked_GTE, min(number, ranked_GTE.shape[-1]))
    chosen_GTE = torch.zeros_like(ranked_GTE, dtype=torch.bool).scatter(-1, best_GTK, True)
    return ranked_GTE.masked_fill(~chosen_GTE, OUT)


@ROUTERS.register(
    Facts(
        family="expert choice",
        equation="S = softmax(X W) over experts;  at each position, I_e = the B·c/E best tokens of e among B sequences",
        paper="arXiv:2310.15961, section 3 (groups across examples); expert choice: arXiv:2202.09368",
        use="Expert choice in a language model: no token can see later ones.",
        beware="Other sequences of the batch decide, in evaluation too, so one sequence alone is routed "
        "differently. Below E/c sequences every token has more experts than planned.",
        causality=Causality(
            causal=True,
            reason="a token competes only with tokens at the same position of other sequences",
            batch_dependent=True,
            with_capacity=False,  # others' later tokens, who look at ours, queue before our earlier ones
        ),
        balanced=True,
        variable_k=True,
    )
)
class ExpertChoiceByPosition(ExpertChoice):
    """Expert choice among the tokens at one position of all sequences: it cannot see the future.

    The grouping of Mixture of Tokens with the choice of experts. An expert takes at least one token of each position,
    so the loads are those of c experts per token only when the batch has at least E/c sequences; below that, each
    token has more experts. Evaluation depends on which sequences stand side by side.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(ExpertChoice.Config):
        """Options of expert choice by position."""

        name: str = "expert_choice_by_position"
        group: Literal["position"] = "position"  # type: ignore[assignment]
        """Among which tokens an expert chooses: those at the same position of all sequences."""

    def _groups(self, num_tokens: int, sequence_length: int) -> Tensor:
        return torch.arange(num_tokens).view(-1, sequence_length).T
