"""Token choice: each token's k best experts with their weights, as most routers select them.

On a GPU one kernel reads the logits once and writes scores, experts and weights (`kernels/gpu/top_k.py`); elsewhere
torch's operators compute the same. Both rank by the rounded values of `ranking`, with ties to the lower index. Logits
and given values select the same experts in both; scores are first rounded in the last bits by either, so a score at the
boundary of a quantum may select another expert among near ties.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moebench.routing.kernels.backend import uses_triton
from moebench.routing.ranking import QUANTUM, SCORE_QUANTUM, rank_top_k

SMALLEST_SUM = 1e-20
"""Shares are the scores over this sum at least: it is 0 for sigmoids of very low logits, and for parts of a softmax
that round to 0, which a bias may select."""
MAX_EXPERTS, MAX_TOP_K = 2048, 64
"""The kernel has all experts of a token in registers, and goes through them once for each choice."""


@dataclass(frozen=True, kw_only=True)
class TopKRule:
    """How a token's experts, weights and scores follow from its logits."""

    top_k: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score of an expert: its part of the softmax over all experts, or the sigmoid of its logit."""
    ranks_scores: bool = False
    """Whether the highest scores, plus a bias, select the experts; else the highest logits."""
    weights: Literal["scores", "shares", "softmax"] = "scores"
    """Weights of the selected experts: their scores, these over their sum, or a softmax over their logits."""

    @property
    def quantum(self) -> float:
        """The precision in which experts are ranked."""
        return SCORE_QUANTUM if self.ranks_scores else QUANTUM


def choose_top_k(
    logits_TE: Tensor,
    rule: TopKRule,
    *,
    ranked_TE: Tensor | None = None,
    bias_E: Tensor | None = None,
    restrict: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's experts, best first, and their weights, both [T, k], and the scores of all experts, [T, E].

    `ranked_TE`: values that select the experts in place of the logits. `bias_E`: added to what selects the experts.
    `restrict`: maps what selects the experts to the same with -inf for experts that a token may not use.
    """
    if restrict is None and _fits(logits_TE, rule, ranked_TE):
        ranked_TE = None if ranked_TE is None else ranked_TE.detach()
        chosen: tuple[Tensor, Tensor, Tensor] = _ChooseTopK.apply(logits_TE, rule, ranked_TE, bias_E)  # type: ignore[no-untyped-call]
        return chosen
    scores_TE = logits_TE.sigmoid() if rule.score == "sigmoid" else logits_TE.softmax(-1)
    if ranked_TE is None:
        ranked_TE = scores_TE if rule.ranks_scores else logits_TE
    if bias_E is not None:
        ranked_TE = ranked_TE.detach() + bias_E
    if restrict is not None:
        ranked_TE = restrict(ranked_TE.detach())
    expert_TK = rank_top_k(ranked_TE, rule.top_k, quantum=rule.quantum)
    if rule.weights == "softmax":
        return expert_TK, logits_TE.gather(-1, expert_TK).softmax(-1), scores_TE
    weight_TK = scores_TE.gather(-1, expert_TK)
    if rule.weights == "shares":
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True).clamp(min=SMALLEST_SUM)
    return expert_TK, weight_TK, scores_TE


def _fits(logits_TE: Tensor, rule: TopKRule, ranked_TE: Tensor | None) -> bool:
    """Return whether the kernel takes the logits: routing is fp32 in every precision."""
    is_fp32 = logits_TE.dtype == torch.float32 and (ranked_TE is None or ranked_TE.dtype == torch.float32)
    is_small = logits_TE.shape[-1] <= MAX_EXPERTS and rule.top_k <= MAX_TOP_K
    return is_fp32 and is_small and uses_triton(logits_TE)


class _ChooseTopK(torch.autograd.Function):
    """The kernel, differentiable in weights and scores."""

    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, rule: TopKRule, ranked_TE: Tensor | None, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        from moebench.routing.kernels.gpu import top_k

        expert_TK, weight_TK, scores_TE = top_k.choose(logits_TE, rule, ranked_TE, bias_E)
        ctx.mark_non_differentiable(expert_TK)
        ctx.set_materialize_grads(False)  # often nothing depends on the scores
        ctx.save_for_backward(expert_TK, weight_TK, scores_TE)
        ctx.rule = rule
        return expert_TK, weight_TK, scores_TE

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, _: None, grad_weight_TK: Tensor | None, grad_scores_TE: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        from moebench.routing.kernels.gpu import top_k

        if grad_weight_TK is None and grad_scores_TE is None:
            return None, None, None, None
        return top_k.choose_backward(ctx.saved_tensors, (grad_weight_TK, grad_scores_TE), ctx.rule), None, None, None
