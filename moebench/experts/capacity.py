"""Capacity: how many assignments an expert takes, and who stays when there are more."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn import functional

from moebench.routing.values import Routing

DropOrder = Literal["router", "position", "score", "random"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Capacity factors of a layer; None is dropless."""

    train: float | None = None
    eval: float | None = None
    drop_order: DropOrder = "router"

    def slots(self, *, training: bool, num_assignments: int, num_experts: int) -> int | None:
        """Return C = ceil(factor · assignments / E), the form of V-MoE and Megatron; None when dropless.

        `num_assignments` is T·k. (Switch and GShard leave k out of the formula: their factor over k is ours.)
        """
        factor = self.train if training else self.eval
        if factor is None or math.isinf(factor):
            return None
        # The small subtraction keeps 1.1 · 10 / 1 from rounding up to 12.
        return math.ceil(factor * num_assignments / num_experts - 1e-9)


def kept_within(routing: Routing, slots: int, order: DropOrder, generator: Generator) -> Tensor:
    """Return kept_N (bool): each expert keeps its `slots` first assignments in the order that the layout names.

    router: by the router's own priority if it has one, else by position. position: earlier tokens first, a token's
    own choices in their order: causal. score: largest weight first (batch prioritized). random: drawn.
    """
    rank_N = _rank_within_expert(routing, _precedence(routing, order, generator))
    return rank_N < slots


def _precedence(routing: Routing, order: DropOrder, generator: Generator) -> Tensor:
    """Return the assignments (indices into N) from the first to be kept to the last."""
    if order == "random":
        return torch.randperm(routing.token_N.numel(), generator=generator, device=routing.token_N.device)
    if order == "score":
        return routing.weight_N.detach().argsort(descending=True, stable=True)
    if order == "router" and routing.priority_N is not None:
        return routing.priority_N.argsort(descending=True, stable=True)
    return routing.token_N.argsort(stable=True)


def _rank_within_expert(routing: Routing, precedence_N: Tensor) -> Tensor:
    """Return each assignment's place in the queue of its expert, from 0; those that do not count queue nowhere."""
    queue_N = routing.expert_N
    if routing.kept_N is not None:
        queue_N = queue_N.where(routing.kept_N, routing.num_experts)
    queue_N, by_queue_N = queue_N[precedence_N].sort(stable=True)
    load_E = routing.load_E
    start_E = functional.pad(load_E.cumsum(0) - load_E, (0, 1))
    place_N = torch.arange(queue_N.numel(), device=queue_N.device) - start_E[queue_N]
    return torch.empty_like(place_N).scatter_(0, precedence_N[by_queue_N], place_N)
