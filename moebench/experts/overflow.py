"""Overflow: what becomes of the assignments that an expert has no slot for: dropped, sent on, or passed unchanged."""

from dataclasses import replace

import torch
from torch import Generator, Tensor

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity, first_of_each_expert, place_in_queue, precedence
from moebench.routing.values import Routing


def within_capacity(routing: Routing, slots: int, capacity: Capacity, generator: Generator) -> Routing:
    """Return the routing in which no expert has more than `slots` assignments."""
    precedence_N = precedence(routing, capacity.drop_order, generator)
    kept = routing.keep(first_of_each_expert(routing, slots, precedence_N))
    return reroute(routing, kept, slots, precedence_N) if capacity.overflow == "reroute" else kept


def passed_on(routing: Routing, kept: Routing, x_TD: Tensor) -> Tensor:
    """Return Σ w·x_t over the assignments that capacity took from each token, as [T, D].

    The convention of StableMoE (arXiv:2204.08396): where an expert has no slot, the token's input goes through
    unchanged, with the weight of the assignment; the gradient reaches both.
    """
    weight_N = routing.weight_N.where(~kept.counted_N, 0.0)
    if routing.top_k is not None:
        weight_T = weight_N.view(-1, routing.top_k).sum(-1)
    else:
        weight_T = weight_N.new_zeros(routing.num_tokens).index_add(0, routing.token_N, weight_N)
    return weight_T.to(x_TD.dtype).unsqueeze(-1) * x_TD


def reroute(routing: Routing, kept: Routing, slots: int, precedence_N: Tensor) -> Routing:
    """Send what is over capacity to the token's next best experts with free slots.

    In rounds, as mesh-TensorFlow's no-token-left-behind (arXiv:2101.03961, appendix B) does: each waiting assignment
    bids for the best-scored expert with a free slot that is not in its token's list (a token's second waiting
    assignment for the second best); each expert takes its first bids in the order of `precedence_N`; the others wait
    for the next round. A round fills an expert or leaves nobody waiting, so E - 1 rounds are enough.

    The weight shrinks as the score does: w · min(1, s_new / s_old). Where the weight is the score (Switch) this is
    the new expert's score, as in mesh-TensorFlow; where it was renormalised it is the new score under the old
    normaliser. The gradient reaches the new score and takes the rest as given. Raises UsageError without scores.
    """
    if routing.scores_TE is None:
        raise UsageError("layout.overflow: 'reroute' needs scores, which this router does not make (try drop or pass)")
    scores_TE = routing.scores_TE.detach()
    expert_N, waiting_N = routing.expert_N, routing.counted_N & ~kept.counted_N
    moved_N = torch.zeros_like(waiting_N)
    free_E = slots - kept.load_E
    taken_TE = torch.zeros(scores_TE.shape, dtype=torch.int32, device=scores_TE.device)
    taken_TE.index_put_((routing.token_N, routing.expert_N), torch.ones_like(expert_N, dtype=torch.int32))
    for _ in range(routing.num_experts - 1):
        bid_N, bids_N = _bids(routing.token_N, waiting_N, scores_TE, (taken_TE == 0) & (free_E > 0), precedence_N)
        if not bids_N.any():
            break
        place_N = place_in_queue(bid_N.where(bids_N, routing.num_experts), routing.num_experts, precedence_N)
        won_N = bids_N & (place_N < free_E[bid_N])
        expert_N, waiting_N, moved_N = bid_N.where(won_N, expert_N), waiting_N & ~won_N, moved_N | won_N
        taken_TE.index_put_((routing.token_N, bid_N), won_N.int(), accumulate=True)
        free_E = free_E.scatter_add(0, bid_N, -won_N.long())
    return replace(
        kept,
        expert_N=expert_N,
        weight_N=_weight_of_moved(routing, routing.scores_TE, expert_N).where(moved_N, kept.weight_N),
        kept_N=kept.counted_N | moved_N,
    )


def _bids(
    token_N: Tensor, waiting_N: Tensor, scores_TE: Tensor, open_TE: Tensor, precedence_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Return for each assignment the expert that it bids for, and whether it bids at all (bool)."""
    num_tokens, num_experts = open_TE.shape
    ranked_TE = scores_TE.masked_fill(~open_TE, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    place_N = place_in_queue(token_N.where(waiting_N, num_tokens), num_tokens, precedence_N)
    bids_N = waiting_N & (place_N < open_TE.sum(-1)[token_N])
    return ranked_TE[token_N, place_N.clamp(max=num_experts - 1)], bids_N


def _weight_of_moved(routing: Routing, scores_TE: Tensor, expert_N: Tensor) -> Tensor:
    old_N = scores_TE[routing.token_N, routing.expert_N].detach()
    new_N = scores_TE[routing.token_N, expert_N]
    weight_N = routing.weight_N.detach()
    shrunk_N = weight_N * (new_N / old_N.clamp(min=1e-20))  # of two scores that both vanish, the ratio is bounded
    return shrunk_N.where(new_N < old_N, weight_N)
