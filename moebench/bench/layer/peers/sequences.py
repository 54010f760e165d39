"""Libraries that route each sequence by itself through one-hot tensors: how they see a row's tokens."""

import math
from typing import Any

import torch
from torch import Tensor

from moebench.bench.layer.problem import Problem
from moebench.bench.layer.variants import CAPACITY_FACTOR

LARGEST_PLAN_BYTES = 2**29


def by_sequence(problem: Problem, x_TD: Tensor) -> Tensor:
    """Return x_BLD."""
    return x_TD.view(-1, problem.sequence_length, x_TD.shape[-1])


def plan_bytes(problem: Problem) -> int:
    """Return the size of one tensor tokens x experts x capacity."""
    shape = problem.shape
    slots = math.ceil(CAPACITY_FACTOR * shape.top_k * problem.sequence_length / shape.num_experts)
    return shape.num_tokens * shape.num_experts * slots * problem.x_TD.element_size()


def dropped_share(problem: Problem, gate: Any) -> float:
    """Return the share of assignments that a gate's one-hot dispatch tensor does not hold."""
    with torch.no_grad():
        combine_BLEC = gate(by_sequence(problem, problem.x_TD))[1]
    return 1 - float((combine_BLEC > 0).sum()) / problem.shape.num_assignments
