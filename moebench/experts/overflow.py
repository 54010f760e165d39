"""Overflow: assignments that an expert has no slot for are dropped, rerouted, or pass their token on unchanged."""

from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from moebench.errors import UsageError
from moebench.experts.capacity import Capacity, find_queue_positions, keep_first_slots, order_by_precedence
from moebench.ranks import Ranks, Span
from moebench.routing.ranking import log_scores, rank_top_k
from moebench.routing.values import Routing
from moebench.seeds import DeferredGenerator

NUM_ROUNDS = 3
"""Other experts at which a token tries to get a slot: mesh-TensorFlow tries the four best, its own choice included."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchAssignments:
    """The assignments of all processes, and the index of the first one of this process."""

    routing: Routing
    start: int = 0

    @classmethod
    def gather(cls, routing: Routing, span: Span, ranks: Ranks, *, with_scores: bool) -> "BatchAssignments":
        """Gather what decides which assignments keep a slot; the result is the same on every process.

        `with_scores`: scores too, which rerouting reads.
        """
        columns = [routing.token_N + span.start, routing.expert_N, routing.counted_N, routing.weight_N.detach()]
        has_unused = with_scores and routing.chosen_N is not None
        columns += [routing.choices_N] if has_unused else []
        columns += [] if routing.priority_N is None else [routing.priority_N.detach()]
        lengths = _count_assignments(routing, span, ranks)
        # One table, because a gather for each column would wait as many times.
        table_NX = ranks.gather(torch.stack([_to_int32(column_N) for column_N in columns], dim=1), lengths)
        gathered_columns = map(_from_int32, table_NX.unbind(1), [column_N.dtype for column_N in columns])
        token_N, expert_N, is_kept_N, weight_N, *others = gathered_columns
        chosen_N = others.pop(0) if has_unused else None
        scores_TE = routing.scores_TE if with_scores else None
        gathered = Routing(
            token_N=token_N,
            expert_N=expert_N,
            weight_N=weight_N,
            num_tokens=span.total,
            num_experts=routing.num_experts,
            scores_TE=None if scores_TE is None else ranks.gather(scores_TE.detach(), span.lengths),
            priority_N=others[0] if others else None,
            kept_N=is_kept_N,
            chosen_N=chosen_N,
        )
        return cls(routing=gathered, start=sum(lengths[: ranks.rank]))

    def local_part(self, value_N: Tensor, routing: Routing) -> Tensor:
        """Return the values of this process's assignments."""
        return value_N[self.start : self.start + routing.expert_N.numel()]


def _to_int32(value_N: Tensor) -> Tensor:
    """Return fp32 numbers by their bits, and integers below 2^31 and booleans as numbers."""
    return value_N.float().view(torch.int32) if value_N.is_floating_point() else value_N.int()


def _from_int32(value_N: Tensor, dtype: torch.dtype) -> Tensor:
    return value_N.contiguous().view(torch.float32).to(dtype) if dtype.is_floating_point else value_N.to(dtype)


def _count_assignments(routing: Routing, span: Span, ranks: Ranks) -> tuple[int, ...]:
    """Return the number of assignments of each process: of a rectangle known from the tokens, else exchanged."""
    if routing.top_k is not None and span.lengths:
        return tuple(length * routing.top_k for length in span.lengths)
    length = torch.full((1,), routing.expert_N.numel(), device=routing.expert_N.device)
    return tuple(int(number) for number in ranks.gather(length, lengths=(1,) * ranks.size).tolist())


def apply_capacity(
    routing: Routing,
    slots: int,
    capacity: Capacity,
    generator: Generator | DeferredGenerator,
    batch: BatchAssignments | None = None,
) -> Routing:
    """Return the routing in which no expert has more than `slots` assignments.

    `batch`: where other processes hold tokens too, all assignments of the batch, which fill the slots together.
    """
    batch = batch or BatchAssignments(routing=routing)
    precedence_N = order_by_precedence(batch.routing, capacity.drop_order, generator)
    kept_N = keep_first_slots(batch.routing, slots, precedence_N)
    if capacity.overflow == "reroute":
        expert_N, kept_N = reroute(batch.routing, kept_N, slots, precedence_N)
        return move_assignments(routing, batch.local_part(expert_N, routing), batch.local_part(kept_N, routing))
    kept = routing.keep(batch.local_part(kept_N, routing))
    if capacity.overflow == "pass":
        return replace(kept, identity_weight_T=identity_overflow(routing, kept))
    return kept


def identity_overflow(routing: Routing, kept: Routing) -> Tensor:
    """Return the weight of each token's own input in the output: Σ w over its assignments that got no slot.

    The convention of StableMoE (arXiv:2204.08396): without a slot the token passes the layer unchanged, with the weight
    of the assignment; the gradient reaches both.
    """
    weight_N = routing.weight_N.where(~kept.counted_N, 0.0)
    if routing.top_k is not None:
        return weight_N.view(-1, routing.top_k).sum(-1)
    return weight_N.new_zeros(routing.num_tokens).index_add(0, routing.token_N, weight_N)


def reroute(routing: Routing, kept_N: Tensor, slots: int, precedence_N: Tensor) -> tuple[Tensor, Tensor]:
    """Send what is over capacity to the token's next best experts with free slots; return expert_N and kept_N.

    In rounds, as in mesh-TensorFlow's no-token-left-behind (`_ntlb_gating`; arXiv:2101.03961, appendix B): in round i
    each token with a waiting assignment requests a slot of the i-th best of the experts that are not in its list,
    whether that expert has a free slot or not; the expert grants requests in the order of `precedence_N` until it is
    full; the others wait for round i + 1. There are `NUM_ROUNDS`. With several experts per token, where mesh-TensorFlow
    has one, a token requests a slot for one assignment at a time, the first of those that wait. Raises UsageError
    without scores.
    """
    if routing.scores_TE is None:
        raise UsageError("layout.overflow: 'reroute' needs scores, which this router does not make (try drop or pass)")
    token_N, num_tokens, num_experts = routing.token_N, routing.num_tokens, routing.num_experts
    expert_N, waiting_N = routing.expert_N, routing.counted_N & ~kept_N
    free_E = slots - routing.keep(kept_N).load_E
    in_list_TE = torch.zeros(routing.scores_TE.shape, dtype=torch.bool, device=expert_N.device)
    in_list_TE[token_N, expert_N] = routing.choices_N
    num_others_T = num_experts - in_list_TE.sum(-1)
    ranked_TE = log_scores(routing.scores_TE).masked_fill(in_list_TE, -torch.inf)
    other_TO = rank_top_k(ranked_TE, min(NUM_ROUNDS, num_experts))
    for turn in range(other_TO.shape[1]):
        candidate_N = other_TO[token_N, turn]
        queue_N = token_N.where(waiting_N, num_tokens)
        is_first_N = find_queue_positions(queue_N, num_tokens, precedence_N, like=routing.weight_N) == 0
        requests_N = waiting_N & is_first_N & (turn < num_others_T[token_N])
        queue_N = candidate_N.where(requests_N, num_experts)
        position_N = find_queue_positions(queue_N, num_experts, precedence_N, like=routing.weight_N)
        granted_N = requests_N & (position_N < free_E[candidate_N])
        expert_N = candidate_N.where(granted_N, expert_N)
        waiting_N, kept_N = waiting_N & ~granted_N, kept_N | granted_N
        free_E = free_E.scatter_add(0, candidate_N, -granted_N.long())
    return expert_N, kept_N


def move_assignments(routing: Routing, expert_N: Tensor, kept_N: Tensor) -> Routing:
    """Return the routing with rerouted assignments moved to their new experts.

    The weight shrinks as the score does: w · min(1, s_new / s_old). Where the weight is the score (Switch) this is
    the new expert's score, as in mesh-TensorFlow; where it was renormalised it is the new score under the old
    normaliser. Only the new score receives a gradient.
    """
    assert routing.scores_TE is not None
    kept = routing.keep(kept_N)
    rerouted_N = kept_N & (expert_N != routing.expert_N)
    weight_N = _shrink_weights(routing, routing.scores_TE, expert_N).where(rerouted_N, kept.weight_N)
    return replace(kept, expert_N=expert_N, weight_N=weight_N, rerouted_N=rerouted_N)


def _shrink_weights(routing: Routing, scores_TE: Tensor, expert_N: Tensor) -> Tensor:
    old_N = scores_TE[routing.token_N, routing.expert_N].detach()
    new_N = scores_TE[routing.token_N, expert_N]
    weight_N = routing.weight_N.detach()
    shrunk_N = weight_N * (new_N / old_N.clamp(min=1e-20))  # bounded where both scores vanish
    return shrunk_N.where(new_N < old_N, weight_N)
