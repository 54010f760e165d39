"""Group-limited selection (also node-limited routing): a token may only use the experts of its best groups."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k


def limit_to_groups(num_groups: int, kept_groups: int, best_of: int) -> Callable[[Tensor], Tensor] | None:
    """Return `mask_to_best_groups` with its options; None where a token may use all groups."""
    if kept_groups == num_groups:
        return None
    return partial(mask_to_best_groups, num_groups=num_groups, kept_groups=kept_groups, best_of=best_of)


def mask_to_best_groups(selection_TE: Tensor, num_groups: int, kept_groups: int, best_of: int) -> Tensor:
    """Return the selection scores with -inf for experts outside each token's `kept_groups` best groups.

    A group is a range of E / num_groups consecutive experts; in the papers, the experts of one node. Its score is the
    sum of its `best_of` highest selection scores: 1 in DeepSeek-V2 (arXiv:2405.04434, section 2.2.2), 2 in DeepSeek-V3
    (arXiv:2412.19437, section 2.1.2). The mask is -inf and not 0, because a bias can push a score below 0.
    """
    if kept_groups == num_groups:
        return selection_TE
    grouped_TGe = selection_TE.view(len(selection_TE), num_groups, selection_TE.shape[-1] // num_groups)
    best_TGn = grouped_TGe.topk(min(best_of, grouped_TGe.shape[-1]), dim=-1).values
    kept_Tg = rank_top_k(best_TGn.sum(-1), kept_groups, quantum=SCORE_QUANTUM)
    kept_TG = torch.zeros_like(best_TGn[..., 0], dtype=torch.bool).scatter(-1, kept_Tg, True)
    masked_TGe = grouped_TGe.masked_fill(~kept_TG.unsqueeze(-1), -torch.inf)
    return masked_TGe.view(selection_TE.shape)


def check_kept_groups(num_groups: int, kept_groups: int, top_k: int, num_experts: int) -> None:
    """Raise UsageError unless groups divide the experts and the kept groups hold at least `top_k` of them."""
    if num_groups < 1 or num_experts % num_groups:
        raise UsageError(
            f"router.num_groups={num_groups} does not divide layout.num_experts={num_experts} (1 turns groups off)"
        )
    smallest = -(-top_k * num_groups // num_experts)
    if not smallest <= kept_groups <= num_groups:
        raise UsageError(
            f"router.kept_groups={kept_groups} does not fit router.num_groups={num_groups} and router.top_k={top_k}"
            f" (allowed: {smallest} to {num_groups})"
        )
