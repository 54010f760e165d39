"""Capacity: how many assignments an expert takes, and which of them when there are more."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from moebench.components import LayoutConfig
from moebench.routing.ranking import log_scores, rank_all
from moebench.routing.sorting import count_keys, sort_keys
from moebench.routing.values import Routing
from moebench.seeds import DeferredGenerator, as_generator

DropOrder = Literal["router", "position", "score", "priority", "random"]
CapacityRule = Literal["megatron", "vmoe", "switch", "deepspeed"]
Overflow = Literal["drop", "reroute", "pass"]

MINIMUM = 4
"""Slots that an expert has at least under the rules `switch` and `deepspeed`."""
MULTIPLE = 4
"""The rule `vmoe` rounds slots up to a multiple of this."""


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity factors of a layer (None is dropless), the rule for slots, and the handling of overflow."""

    train: float | None = None
    eval: float | None = None
    drop_order: DropOrder = "router"
    rule: CapacityRule = "megatron"
    overflow: Overflow = "drop"

    @classmethod
    def from_layout(cls, layout: LayoutConfig) -> "Capacity":
        """Return the capacity that the options of a layout describe."""
        return cls(
            train=layout.capacity_factor_train,
            eval=layout.capacity_factor_eval,
            drop_order=layout.drop_order,
            rule=layout.capacity_rule,
            overflow=layout.overflow,
        )

    @property
    def is_dropless(self) -> bool:
        """Whether no expert has a limit, in training or in evaluation."""
        return all(factor is None or math.isinf(factor) for factor in (self.train, self.eval))

    def slots(self, *, training: bool, num_tokens: int, experts_per_token: int, num_experts: int) -> int | None:
        """Return C, the slots of one expert; None when dropless.

        With T tokens, k experts per token, E experts and the factor f:
        megatron: ceil(T·k·f / E), Megatron-LM's. vmoe: the same rounded up to a multiple of 4 (arXiv:2106.05974).
        deepspeed: the same, at least 4. switch: max(int(T·f / E), 4), of mesh-TensorFlow (arXiv:2101.03961):
        rounded down and without k, so with k experts per token its factor is k times the others'.
        Never more than T under any rule: an expert can have a token only once.
        """
        factor = self.train if training else self.eval
        if factor is None or math.isinf(factor):
            return None
        share = factor * num_tokens / num_experts
        # The small number keeps 1.1 · 10 / 1, a little more than 11, from rounding up, and 2.3 · 100 / 10 from down.
        if self.rule == "switch":
            slots = max(math.floor(share + 1e-9), MINIMUM)
        else:
            slots = math.ceil(share * experts_per_token - 1e-9)
        if self.rule == "vmoe":
            slots = math.ceil(slots / MULTIPLE) * MULTIPLE
        elif self.rule == "deepspeed":
            slots = max(slots, MINIMUM)
        return min(slots, num_tokens)


def keep_first_slots(routing: Routing, slots: int, precedence_N: Tensor) -> Tensor:
    """Return kept_N (bool): the first `slots` assignments of each expert, among those that count."""
    queue_N = routing.expert_N.where(routing.counted_N, routing.num_experts)
    position_N = find_queue_positions(queue_N, routing.num_experts, precedence_N, like=routing.weight_N)
    return routing.counted_N & (position_N < slots)


def order_by_precedence(routing: Routing, order: DropOrder, generator: Generator | DeferredGenerator) -> Tensor:
    """Return the assignments (indices into N) from the first to be kept to the last.

    router: by the router's own priority if it has one, else by position. position: earlier tokens first, a token's
    own choices in their order: causal. score: all assignments by weight, the largest first, whichever of its token's
    choices it is. priority: all first choices before all second ones, and so on; among those, tokens by their largest
    weight (batch prioritized routing of V-MoE, arXiv:2106.05974, appendix C). random: a random permutation. Weights are
    compared as in `routing.ranking`; equal ones are kept in the order of the list, or of tokens.
    """
    if order == "random":
        return torch.randperm(routing.token_N.numel(), generator=as_generator(generator), device=routing.token_N.device)
    if order == "score":
        return rank_all(log_scores(routing.weight_N))
    if order == "priority":
        return _first_choices_first(routing)
    if order == "router" and routing.priority_N is not None:
        return rank_all(routing.priority_N)
    if routing.top_k is not None:  # token after token
        return torch.arange(routing.token_N.numel(), device=routing.token_N.device)
    return sort_keys(routing.token_N, None, routing.num_tokens, like=routing.weight_N).index_N


def _first_choices_first(routing: Routing) -> Tensor:
    """Return the assignments by choice, then by the largest weight of their token, then by token."""
    token_N, num_tokens = routing.token_N, routing.num_tokens
    weight_N = log_scores(routing.weight_N)
    choice_N = find_queue_positions(token_N, num_tokens, rank_all(weight_N), like=routing.weight_N)
    best_T = weight_N.new_full((num_tokens,), -torch.inf).scatter_reduce(0, token_N, weight_N, "amax")
    ranked_T = rank_all(best_T)
    rank_T = torch.empty_like(ranked_T).scatter_(0, ranked_T, torch.arange(num_tokens, device=ranked_T.device))
    return (choice_N * num_tokens + rank_T[token_N]).argsort()


def find_queue_positions(queue_N: Tensor, num_queues: int, precedence_N: Tensor, *, like: Tensor) -> Tensor:
    """Return each assignment's position in its queue, from 0; queue `num_queues` is for those outside all queues.

    `like`: see `sort_keys`.
    """
    queued_N = queue_N[precedence_N]
    by_queue = sort_keys(queued_N, None, num_queues + 1, like=like)
    length_Q = count_keys(queued_N, None, num_queues + 1) if by_queue.count_Q is None else by_queue.count_Q
    start_Q = length_Q.cumsum(0) - length_Q
    position_N = torch.arange(queue_N.numel(), device=queue_N.device) - start_Q[queued_N[by_queue.index_N]]
    return torch.empty_like(position_N).scatter_(0, precedence_N[by_queue.index_N], position_N)
