"""st-moe-pytorch: top-n gating with capacity and GEGLU experts; its own formula, never dropless."""

from typing import Any

import torch
from st_moe_pytorch import MoE
from torch import Tensor

from moebench.bench.layer.peers.sequences import (
    MAX_PLAN_BYTES,
    compute_plan_bytes,
    measure_dropped_share,
    split_sequences,
)
from moebench.bench.layer.problem import Candidate, Problem, Skipped
from moebench.bench.layer.variants import CAPACITY_FACTOR

NAME = "st-moe-pytorch"


def build_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return its layer on rows with a gated activation and k > 1."""
    shape = problem.shape
    if not problem.is_gated or shape.top_k < 2:
        return []
    if compute_plan_bytes(problem) > MAX_PLAN_BYTES:
        return [Skipped(name=NAME, reason="its one-hot plan (tokens x experts x capacity) would not fit")]
    factor = CAPACITY_FACTOR * shape.top_k  # its factor leaves k out
    moe: Any = MoE(
        dim=shape.d_model,
        num_experts=shape.num_experts,
        expert_hidden_mult=(shape.hidden + 0.5) * 1.5 / shape.d_model,  # it rounds down 2/3 of this
        gating_top_n=shape.top_k,
        threshold_train=0.0,
        threshold_eval=0.0,
        capacity_factor_train=factor,
        capacity_factor_eval=factor,
    )
    problem.place_module(moe)
    width = moe.experts.experts[0].net[-1].in_features
    if width != shape.hidden:
        return [Skipped(name=NAME, reason=f"its width is {width}, not {shape.hidden}")]
    with torch.no_grad():
        moe.gate.to_gates.weight.copy_(problem.gate_ED)

    def forward(x_TD: Tensor) -> Tensor:
        y_BLD: Tensor = moe(split_sequences(problem, x_TD)).outputs
        return y_BLD.flatten(0, 1)

    return [
        Candidate(
            name=NAME,
            module=moe,
            forward=forward,
            note="GEGLU with biases, capacity 1.25 per sequence: same gate, not the same formula",
            agrees_with=None,
            measure_dropped=lambda: measure_dropped_share(problem, moe.gate),
        )
    ]
