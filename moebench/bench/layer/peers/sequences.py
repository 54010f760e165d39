"""Shared code of the adapters for libraries that route each sequence separately through one-hot tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from moebench.bench.layer.problem import Problem
from moebench.bench.layer.variants import CAPACITY_FACTOR

MAX_PLAN_BYTES = 2**29


def split_sequences(problem: Problem, x_TD: Tensor) -> Tensor:
    """Return x_TD as x_BLD."""
    return x_TD.view(-1, problem.sequence_length, x_TD.shape[-1])


def compute_plan_bytes(problem: Problem) -> int:
    """Return the size of one tensor [tokens, experts, capacity]."""
    shape = problem.shape
    slots = math.ceil(CAPACITY_FACTOR * shape.top_k * problem.sequence_length / shape.num_experts)
    return shape.num_tokens * shape.num_experts * slots * problem.x_TD.element_size()


def measure_dropped_share(problem: Problem, gate: Any) -> float:
    """Return the share of assignments that are not in a gate's one-hot dispatch tensor."""
    with torch.no_grad():
        combine_BLEC = gate(split_sequences(problem, problem.x_TD))[1]
    return 1 - float((combine_BLEC > 0).sum()) / problem.shape.num_assignments
