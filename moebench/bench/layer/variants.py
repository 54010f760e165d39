"""moebench's own layer in its variants, and the dense twin that all ratios refer to."""

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.bench.layer.problem import Candidate, Problem, Skipped, make_layer
from moebench.experts.dispatch import DispatchPlan
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import MoELayer
from moebench.experts.reference import double_loop
from moebench.models.transformer import BatchContext
from moebench.routing.context import RouteContext
from moebench.routing.layer_name import LayerName

DENSE, OURS, CAPACITY = "dense", "moebench", "moebench capacity 1.25"
CAPACITY_FACTOR = 1.25
LOOP_ASSIGNMENTS = 64
"""The double loop is measured on as many tokens as make this number of assignments, and scaled up."""


def route_context(problem: Problem, num_tokens: int | None = None, *, training: bool = True) -> RouteContext:
    """Return what a router gets in training: a context with a generator made anew for the step and the layer."""
    tokens = num_tokens or problem.shape.num_tokens
    length = min(problem.sequence_length, tokens)
    return BatchContext(training=training, seed=problem.seed).route(LayerName(), length, problem.device)


def dense_twin(problem: Problem) -> Candidate:
    """Return the ordinary network of equal active FLOPs."""
    return Candidate(name=DENSE, module=problem.dense, forward=problem.dense, agrees_with=None)


def own_variants(problem: Problem) -> list[Candidate | Skipped]:
    """Return the dropless layer, then what differs from it in one thing."""
    ours = Candidate(name=OURS, module=problem.layer, forward=_forward(problem, problem.layer), agrees_with=None)
    return [ours, _with_capacity(problem), _with_recompute(problem), _in_bf16(problem)]


def _forward(problem: Problem, layer: MoELayer) -> Callable[[Tensor], Tensor]:
    def forward(x_TD: Tensor) -> Tensor:
        y_TD: Tensor
        y_TD, _ = layer(x_TD, route_context(problem, training=layer.training))
        return y_TD

    return forward


def _with_capacity(problem: Problem) -> Candidate:
    layer = make_layer(problem.shape, problem.bank, problem.layer.router, CAPACITY_FACTOR)

    def dropped() -> float:
        with torch.no_grad():
            _, record = layer(problem.x_TD, route_context(problem))
        return int(record.num_dropped) / problem.shape.num_assignments

    return Candidate(
        name=CAPACITY,
        module=layer,
        forward=_forward(problem, layer),
        note="earlier tokens keep their slot",
        agrees_with=None,
        dropped=dropped,
    )


def _with_recompute(problem: Problem) -> Candidate:
    shape, weights = problem.shape, problem.bank
    bank = ExpertBank(shape.d_model, shape.hidden, shape.num_experts, shape.activation, recompute=True)
    bank.w_in_EDF, bank.w_out_EFD = weights.w_in_EDF, weights.w_out_EFD
    layer = make_layer(shape, bank, problem.layer.router)
    return Candidate(name="moebench recompute", module=layer, forward=_forward(problem, layer))


def _in_bf16(problem: Problem) -> Candidate | Skipped:
    name = "moebench bf16"
    if problem.dtype is torch.bfloat16:
        return Skipped(name=name, reason="the whole row is bf16")
    if not has_bf16_units(problem.device):
        return Skipped(name=name, reason="this CPU has no bf16 units")
    plain = _forward(problem, problem.layer)

    def forward(x_TD: Tensor) -> Tensor:
        with torch.autocast(problem.device.type, dtype=torch.bfloat16):
            return plain(x_TD)

    return Candidate(
        name=name, module=problem.layer, forward=forward, note="autocast; weights cast at each call", agrees_with=None
    )


def has_bf16_units(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 here; without such units they run about 100 times slower."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in questions)


def router_and_plan(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the part of the layer before the experts: router, and sorting the assignments; gives the weights."""

    def forward(x_TD: Tensor) -> Tensor:
        routing = problem.layer.router(x_TD.float(), route_context(problem))
        DispatchPlan.of(routing)
        weight_N: Tensor = routing.weight_N
        return weight_N

    return forward


def loop_tokens(problem: Problem) -> int:
    """Return the number of tokens that the double loop is measured on."""
    return max(1, min(problem.shape.num_tokens, LOOP_ASSIGNMENTS // problem.shape.top_k))


def loop_forward(problem: Problem) -> Callable[[Tensor], Tensor]:
    """Return the slow, obvious form: a Python loop over assignments."""

    def forward(x_TD: Tensor) -> Tensor:
        routing = problem.layer.router(x_TD.float(), route_context(problem, len(x_TD)))
        return double_loop(problem.bank, x_TD, routing)

    return forward
