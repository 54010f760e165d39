"""Overflow: what becomes of the assignments that an expert has no slot for: dropped, sent on, or passed unchanged."""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity, first_of_each_expert, place_in_queue, precedence
from moebench.ranks import Ranks, Span
from moebench.routing.ranking import log_scores, rank_top_k
from moebench.routing.values import Routing

NUM_ROUNDS = 3
"""Other experts that a token asks for a slot: mesh-TensorFlow tries the four best, its own choice among them."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """The assignments of all processes, and where this one's begin."""

    routing: Routing
    start: int

    @classmethod
    def of(cls, routing: Routing, span: Span, ranks: Ranks) -> "Batch":
        """Gather what decides who keeps a slot; on every process the same."""
        scores_TE, priority_N = routing.scores_TE, routing.priority_N
        length_W = ranks.gather(torch.tensor([routing.expert_N.numel()], device=routing.expert_N.device))
        whole = Routing(
            token_N=ranks.gather(routing.token_N + span.start),
            expert_N=ranks.gather(routing.expert_N),
            weight_N=ranks.gather(routing.weight_N.detach()),
            num_tokens=span.total,
            num_experts=routing.num_experts,
            scores_TE=None if scores_TE is None else ranks.gather(scores_TE.detach()),
            priority_N=None if priority_N is None else ranks.gather(priority_N),
            kept_N=ranks.gather(routing.counted_N),
        )
        return cls(routing=whole, start=int(length_W[: ranks.rank].sum()))

    def own(self, value_N: Tensor, routing: Routing) -> Tensor:
        """Return what was decided about this process's assignments."""
        return value_N[self.start : self.start + routing.expert_N.numel()]


def within_capacity(
    routing: Routing, slots: int, capacity: Capacity, generator: Generator, batch: Batch | None = None
) -> Routing:
    """Return the routing in which no expert has more than `slots` assignments.

    `batch`: where other processes hold tokens too, all assignments of the batch, which fill the slots together.
    """
    batch = batch or Batch(routing=routing, start=0)
    precedence_N = precedence(batch.routing, capacity.drop_order, generator)
    kept_N = first_of_each_expert(batch.routing, slots, precedence_N)
    if capacity.overflow != "reroute":
        return routing.keep(batch.own(kept_N, routing))
    expert_N, kept_N = reroute(batch.routing, kept_N, slots, precedence_N)
    return _sent(routing, batch.own(expert_N, routing), batch.own(kept_N, routing))


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


def reroute(routing: Routing, kept_N: Tensor, slots: int, precedence_N: Tensor) -> tuple[Tensor, Tensor]:
    """Send what is over capacity to the token's next best experts where they have slots; return expert_N and kept_N.

    In rounds, as mesh-TensorFlow's no-token-left-behind (`_ntlb_gating`; arXiv:2101.03961, appendix B): in round i each
    token with a waiting assignment bids for the i-th best of the experts that are not in its list, whether that has a
    free slot or not; the expert takes bids in the order of `precedence_N` until it is full; the others wait for round
    i + 1. There are `NUM_ROUNDS`. With several experts per token, where mesh-TensorFlow has one, a token bids with one
    assignment at a time, the first of those that wait. Raises UsageError without scores.
    """
    if routing.scores_TE is None:
        raise UsageError("layout.overflow: 'reroute' needs scores, which this router does not make (try drop or pass)")
    token_N, num_tokens, num_experts = routing.token_N, routing.num_tokens, routing.num_experts
    expert_N, waiting_N = routing.expert_N, routing.counted_N & ~kept_N
    free_E = slots - routing.keep(kept_N).load_E
    in_list_TE = torch.zeros(routing.scores_TE.shape, dtype=torch.bool, device=expert_N.device)
    in_list_TE[token_N, expert_N] = True
    num_others_T = num_experts - in_list_TE.sum(-1)
    ranked_TE = log_scores(routing.scores_TE).masked_fill(in_list_TE, -torch.inf)
    other_TO = rank_top_k(ranked_TE, min(NUM_ROUNDS, num_experts))
    for turn in range(other_TO.shape[1]):
        bid_N = other_TO[token_N, turn]
        first_N = place_in_queue(token_N.where(waiting_N, num_tokens), num_tokens, precedence_N) == 0
        bids_N = waiting_N & first_N & (turn < num_others_T[token_N])
        place_N = place_in_queue(bid_N.where(bids_N, num_experts), num_experts, precedence_N)
        won_N = bids_N & (place_N < free_E[bid_N])
        expert_N, waiting_N, kept_N = bid_N.where(won_N, expert_N), waiting_N & ~won_N, kept_N | won_N
        free_E = free_E.scatter_add(0, bid_N, -won_N.long())
    return expert_N, kept_N


def _sent(routing: Routing, expert_N: Tensor, kept_N: Tensor) -> Routing:
    """Return the routing with the assignments where rerouting put them.

    The weight shrinks as the score does: w · min(1, s_new / s_old). Where the weight is the score (Switch) this is
    the new expert's score, as in mesh-TensorFlow; where it was renormalised it is the new score under the old
    normaliser. The gradient reaches the new score and takes the rest as given.
    """
    assert routing.scores_TE is not None
    kept = routing.keep(kept_N)
    moved_N = kept_N & (expert_N != routing.expert_N)
    weight_N = _weight_of_moved(routing, routing.scores_TE, expert_N).where(moved_N, kept.weight_N)
    return replace(kept, expert_N=expert_N, weight_N=weight_N)


def _weight_of_moved(routing: Routing, scores_TE: Tensor, expert_N: Tensor) -> Tensor:
    old_N = scores_TE[routing.token_N, routing.expert_N].detach()
    new_N = scores_TE[routing.token_N, expert_N]
    weight_N = routing.weight_N.detach()
    shrunk_N = weight_N * (new_N / old_N.clamp(min=1e-20))  # of two scores that both vanish, the ratio is bounded
    return shrunk_N.where(new_N < old_N, weight_N)
