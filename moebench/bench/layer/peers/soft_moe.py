"""soft-moe-pytorch: every slot is a mixture of the tokens of a sequence; another formula, nothing is dropped."""

from typing import Any

from soft_moe_pytorch import SoftMoE
from torch import Tensor

from moebench.bench.layer.peers.sequences import split_sequences
from moebench.bench.layer.problem import Candidate, Problem, Skipped

NAME = "soft-moe-pytorch"


def build_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return its layer on GELU rows, with as many slots as the row has assignments."""
    shape = problem.shape
    if problem.is_gated:
        return []
    slots = problem.sequence_length * shape.top_k // shape.num_experts
    if slots * shape.num_experts != problem.sequence_length * shape.top_k:
        return [Skipped(name=NAME, reason="the experts do not divide the assignments of a sequence")]
    moe: Any = SoftMoE(
        dim=shape.d_model,
        num_slots=slots,
        num_experts=shape.num_experts,
        expert_mult=(shape.hidden + 0.5) / shape.d_model,  # it rounds down
        offload_unused_experts_to_cpu=False,
    )
    problem.place_module(moe)

    def forward(x_TD: Tensor) -> Tensor:
        y_BLD: Tensor = moe(split_sequences(problem, x_TD))
        return y_BLD.flatten(0, 1)

    note = "Soft MoE with as many slots as there are assignments: no gate, so its own formula and no load"
    return [Candidate(name=NAME, module=moe, forward=forward, note=note, agrees_with=None)]
