"""mixture-of-experts: top-2 gating with capacity and two batched products; never dropless."""

from typing import Any

import torch
from mixture_of_experts import MoE
from torch import Tensor, nn

from moebench.bench.layer.peers.sequences import (
    MAX_PLAN_BYTES,
    compute_plan_bytes,
    measure_dropped_share,
    split_sequences,
)
from moebench.bench.layer.problem import Candidate, Problem, Skipped
from moebench.bench.layer.variants import CAPACITY_FACTOR

NAME = "mixture-of-experts"


def build_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return its layer on rows with GELU and k = 2."""
    shape = problem.shape
    if problem.is_gated or shape.top_k != 2:
        return []
    if compute_plan_bytes(problem) > MAX_PLAN_BYTES:
        return [Skipped(name=NAME, reason="its one-hot plan (tokens x experts x capacity) would not fit")]
    moe = build(problem, CAPACITY_FACTOR)
    return [
        Candidate(
            name=NAME,
            module=moe,
            forward=forward_of(problem, moe),
            note="capacity 1.25 per sequence, second choices drop first",
            agrees_with=None,
            measure_dropped=lambda: measure_dropped_share(problem, moe.gate),
        )
    ]


def build(problem: Problem, capacity_factor: float) -> Any:
    """Return its layer with the row's weights; the factor is in our form, with k."""
    shape = problem.shape
    factor = capacity_factor * shape.top_k  # its factor leaves k out
    moe: Any = MoE(
        dim=shape.d_model,
        num_experts=shape.num_experts,
        hidden_dim=shape.hidden,
        activation=nn.GELU,
        second_policy_train="all",
        second_policy_eval="all",
        capacity_factor_train=factor,
        capacity_factor_eval=factor,
    )
    problem.place_module(moe)
    with torch.no_grad():
        moe.gate.w_gating.copy_(problem.gate_ED.t())
        moe.experts.w1.copy_(problem.bank.w_in_EDF)
        moe.experts.w2.copy_(problem.bank.w_out_EFD)
    return moe


def forward_of(problem: Problem, moe: Any) -> Any:
    """Return its forward pass on x_TD."""

    def forward(x_TD: Tensor) -> Tensor:
        y_BLD: Tensor = moe(split_sequences(problem, x_TD))[0]
        return y_BLD.flatten(0, 1)

    return forward
