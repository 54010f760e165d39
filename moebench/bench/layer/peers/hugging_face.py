"""transformers: the MoE blocks of Mixtral, Qwen3-MoE, OLMoE and Switch."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, OlmoeConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from moebench.bench.layer.problem import Candidate, Problem, Skipped
from moebench.bench.layer.shapes import Shape
from moebench.bench.layer.variants import CAPACITY, CAPACITY_FACTOR

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
BATCHED_UP_TO = 512
"""Assignments: batched_mm copies an expert's weights for each of them."""


def build_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return the blocks that compute this row's formula."""
    if problem.shape.top_k == 1:
        return [] if problem.is_gated else [_switch(problem)]
    if not problem.is_gated:
        return []
    blocks: dict[str, Callable[[Shape], Any]] = {"Mixtral": _mixtral, "Qwen3-MoE": _qwen3}
    if (problem.shape.num_experts, problem.shape.top_k) == (64, 8):
        blocks["OLMoE"] = _olmoe
    return [_block(problem, name, build, how) for name, build in blocks.items() for how in IMPLEMENTATIONS]


def _block(problem: Problem, name: str, build: Callable[[Shape], Any], implementation: str) -> Candidate | Skipped:
    name = f"{name} {implementation}"
    if implementation == "batched_mm" and problem.shape.num_assignments > BATCHED_UP_TO:
        return Skipped(name=name, reason=f"copies the weights for each assignment: only up to T·k = {BATCHED_UP_TO}")
    block: Any = problem.place_module(build(problem.shape))
    block.experts.config._experts_implementation = implementation
    with torch.no_grad():
        block.gate.weight.copy_(problem.gate_ED)
        block.experts.gate_up_proj.copy_(problem.bank.w_in_EDF.transpose(1, 2))
        block.experts.down_proj.copy_(problem.bank.w_out_EFD.transpose(1, 2))
    return Candidate(name=name, module=block, forward=lambda x_TD: _output(block(x_TD.unsqueeze(0))))


def _output(result: Any) -> Tensor:
    y_BLD: Tensor = result[0] if isinstance(result, tuple) else result
    return y_BLD.squeeze(0)


def _mixtral(shape: Shape) -> Any:
    return MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=shape.d_model,
            intermediate_size=shape.hidden,
            num_local_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
        )
    )


def _qwen3(shape: Shape) -> Any:
    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(
            hidden_size=shape.d_model,
            moe_intermediate_size=shape.hidden,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,  # the row's formula: the k weights sum to 1
        )
    )


def _olmoe(shape: Shape) -> Any:
    return OlmoeSparseMoeBlock(
        OlmoeConfig(
            hidden_size=shape.d_model,
            intermediate_size=shape.hidden,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
    )


def _switch(problem: Problem) -> Candidate:
    shape = problem.shape
    slots = math.ceil(CAPACITY_FACTOR * shape.num_tokens / shape.num_experts - 1e-9)
    config = SwitchTransformersConfig(
        d_model=shape.d_model,
        d_ff=shape.hidden,
        num_experts=shape.num_experts,
        expert_capacity=slots,
        router_jitter_noise=0.0,
        dropout_rate=0.0,
        dense_act_fn="gelu",
    )
    block: Any = problem.place_module(SwitchTransformersSparseMLP(config))
    with torch.no_grad():
        block.router.classifier.weight.copy_(problem.gate_ED)
        for index in range(shape.num_experts):
            expert = block.experts[f"expert_{index}"]
            expert.wi.weight.copy_(problem.bank.w_in_EDF[index].t())
            expert.wo.weight.copy_(problem.bank.w_out_EFD[index].t())

    def measure_dropped() -> float:
        with torch.no_grad():
            chosen_BLE, _, _ = block.router(problem.x_TD.unsqueeze(0))
        return 1 - float(chosen_BLE.sum()) / shape.num_assignments

    return Candidate(
        name="HF Switch capacity 1.25",
        module=block,
        forward=lambda x_TD: _output(block(x_TD.unsqueeze(0))),
        note="drops over its capacity",
        agrees_with=CAPACITY,
        measure_dropped=measure_dropped,
    )
