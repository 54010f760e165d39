"""moebench's layer in several variants, and the dense twin that all ratios refer to."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from moebench.bench.layer.problem import Candidate, Problem, Skipped, make_layer
from moebench.experts.dispatch import DispatchPlan
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import MoELayer
from moebench.experts.reference import double_loop
from moebench.models.transformer import BatchContext
from moebench.routing.context import RouteContext
from moebench.routing.layer_name import LayerName

DENSE, OURS, CAPACITY = "dense", "moebench", "moebench capacity 1.25"
DENSE_OPERATORS, DENSE_BF16 = "dense in torch", "dense bf16"
CAPACITY_FACTOR = 1.25
LOOP_ASSIGNMENTS = 64
"""Assignments that the double loop is measured on; its time is scaled to all tokens."""


def route_context(problem: Problem, num_tokens: int | None = None, *, training: bool = True) -> RouteContext:
    """Return a router's context, with a new generator."""
    tokens = num_tokens or problem.shape.num_tokens
    length = min(problem.sequence_length, tokens)
    return BatchContext(training=training, seed=problem.seed).route(LayerName(), length, problem.device)


def build_dense_twin(problem: Problem) -> Candidate:
    """Return the dense network of equal active FLOPs."""
    return Candidate(name=DENSE, module=problem.dense, forward=problem.dense, agrees_with=None)


def build_other_dense(problem: Problem) -> list[Candidate | Skipped]:
    """Return the dense network without moebench's kernels, and in bf16 as the layer's bf16 variant computes."""
    dense = problem.dense

    def in_torch(x_TD: Tensor) -> Tensor:
        hidden_TF = x_TD @ dense.w_in_DF
        if not problem.is_gated:
            return functional.gelu(hidden_TF) @ dense.w_out_FD
        gate_TF, value_TF = hidden_TF.chunk(2, dim=-1)
        return (functional.silu(gate_TF) * value_TF) @ dense.w_out_FD

    operators = Candidate(name=DENSE_OPERATORS, module=dense, forward=in_torch, agrees_with=DENSE)
    return [operators, _in_bf16(problem, DENSE_BF16, dense, dense)]


def build_variants(problem: Problem) -> list[Candidate | Skipped]:
    """Return the dropless layer, then variants that differ from it in one respect."""
    forward = _forward(problem, problem.layer)
    ours = Candidate(name=OURS, module=problem.layer, forward=forward, agrees_with=None)
    bf16 = _in_bf16(problem, "moebench bf16", problem.layer, forward)
    return [ours, _with_capacity(problem), _with_recompute(problem), bf16]


def _forward(problem: Problem, layer: MoELayer) -> Callable[[Tensor], Tensor]:
    def forward(x_TD: Tensor) -> Tensor:
        y_TD: Tensor
        y_TD, _ = layer(x_TD, route_context(problem, training=layer.training))
        return y_TD

    return forward


def _with_capacity(problem: Problem) -> Candidate:
    layer = make_layer(problem.shape, problem.bank, problem.layer.router, CAPACITY_FACTOR)

    def measure_dropped() -> float:
        with torch.no_grad():
            _, record = layer(problem.x_TD, route_context(problem))
        return int(record.num_dropped) / problem.shape.num_assignments

    return Candidate(
        name=CAPACITY,
        module=layer,
        forward=_forward(problem, layer),
        note="earlier tokens keep their slot",
        agrees_with=None,
        measure_dropped=measure_dropped,
    )


def _with_recompute(problem: Problem) -> Candidate | Skipped:
    name = "moebench recompute"
    if problem.device.type != "cpu":
        return Skipped(name=name, reason="on a GPU the activation is never kept")
    shape, weights = problem.shape, problem.bank
    bank = ExpertBank(shape.d_model, shape.hidden, shape.num_experts, shape.activation, recompute=True)
    bank.w_in_EDF, bank.w_out_EFD = weights.w_in_EDF, weights.w_out_EFD
    layer = make_layer(shape, bank, problem.layer.router)
    return Candidate(name=name, module=layer, forward=_forward(problem, layer))


def _in_bf16(
    problem: Problem, name: str, module: nn.Module, compute: Callable[[Tensor], Tensor]
) -> Candidate | Skipped:
    if problem.dtype is torch.bfloat16:
        return Skipped(name=name, reason="the whole row is bf16")
    if not has_bf16_units(problem.device):
        return Skipped(name=name, reason="this CPU has no bf16 units")

    def forward(x_TD: Tensor) -> Tensor:
        with torch.autocast(problem.device.type, dtype=torch.bfloat16):
            return compute(x_TD)

    return Candidate(
        name=name, module=module, forward=forward, note="autocast; weights cast at each call", agrees_with=None
    )


def has_bf16_units(device: torch.device) -> bool:
    """Return whether the device has bf16 units; without them bf16 products are about 100 times slower than fp32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in checks)


def build_router_call(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the part of the layer before the experts, router and dispatch plan, as a function x_TD -> weight_N."""

    def forward(x_TD: Tensor) -> Tensor:
        routing = problem.layer.router(x_TD.float(), route_context(problem))
        DispatchPlan.of(routing)
        weight_N: Tensor = routing.weight_N
        return weight_N

    return forward


def count_loop_tokens(problem: Problem) -> int:
    """Return the number of tokens that the double loop is measured on."""
    return max(1, min(problem.shape.num_tokens, LOOP_ASSIGNMENTS // problem.shape.top_k))


def build_loop_call(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the reference implementation, a Python loop over assignments, as a function x_TD -> y_TD."""

    def forward(x_TD: Tensor) -> Tensor:
        routing = problem.layer.router(x_TD.float(), route_context(problem, len(x_TD)))
        return double_loop(problem.bank, x_TD, routing)

    return forward
