"""One row of the layer benchmark: every variant and library on one problem, interleaved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moebench.bench.layer.peers.register import build_peer_candidates
from moebench.bench.layer.plain import NAME as PLAIN
from moebench.bench.layer.plain import build_plain_layer
from moebench.bench.layer.problem import MAX_DIFFERENCE, Candidate, Problem, Skipped
from moebench.bench.layer.saved import count_saved_bytes, min_saved_bytes
from moebench.bench.layer.variants import (
    DENSE,
    LOOP_ASSIGNMENTS,
    OURS,
    build_dense_twin,
    build_loop_call,
    build_other_dense,
    build_router_call,
    build_variants,
    count_loop_tokens,
    route_context,
)
from moebench.bench.timing import Protocol, Spread, TimedCall, Timings

GEMM, ROUTER, LOOP = "gemm", "router+plan", "double loop"
MIN_DENSE_SHARE = 0.75
"""Share of the plain product's rate that the dense twin must reach, else the row is marked."""
TRAIN_FLOPS = 3
"""FLOPs of forward and backward over those of forward."""


@dataclass(frozen=True, kw_only=True)
class CandidateResult:
    """One variant or library in a row; ratios are to the dense twin in the same round."""

    name: str
    note: str
    forward_ms: float
    train_ms: float
    """Forward and backward, with gradients of the input, the gate and all weights."""
    forward: Spread
    train: Spread
    forward_tflops: float
    """FLOPs of the active experts per second."""
    train_tflops: float
    saved_bytes: int | None
    dropped: float
    difference: float | None
    """Largest difference to the output it must equal, as a share of the largest output; None: another formula."""
    agrees: bool | None
    approximate: bool = False
    """Measured on a part of the tokens and scaled."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured row."""

    problem: Problem
    lines: tuple[CandidateResult, ...]
    skipped: tuple[Skipped, ...]
    forward_rounds: Timings
    train_rounds: Timings
    load_E: tuple[int, ...]
    gemm_tflops: float
    least_saved_bytes: int

    @property
    def dense_share(self) -> float:
        """Rate of the dense twin (forward and backward) as a share of a plain product's rate in the same rounds."""
        work = TRAIN_FLOPS * self.problem.shape.flops / count_gemm_flops(self.problem)
        return work * self.train_rounds.ratio(GEMM, DENSE).median

    @property
    def is_busy(self) -> bool:
        """Whether other processes used the machine in rounds that count."""
        return self.forward_rounds.num_contended > 0 or self.train_rounds.num_contended > 0

    @property
    def is_certified(self) -> bool:
        """Whether the machine ran near its full speed."""
        return self.dense_share >= MIN_DENSE_SHARE

    def router_share(self) -> tuple[Spread, Spread]:
        """Return the time of router and sorting over that of the layer: forward, forward and backward."""
        return self.forward_rounds.ratio(ROUTER, OURS), self.train_rounds.ratio(ROUTER, OURS)

    @property
    def saved_reference(self) -> int | None:
        """Bytes that plain grouped_mm saves for backward; None when it is not in the row."""
        return next((line.saved_bytes for line in self.lines if line.name == PLAIN), None)


def count_gemm_flops(problem: Problem) -> int:
    """Return the FLOPs of the plain product: all tokens times the first matrix of the dense twin."""
    return 2 * problem.shape.num_tokens * problem.dense.w_in_DF.numel()


def measure_row(problem: Problem, protocol: Protocol, *, with_loop: bool = True) -> Row:
    """Measure every variant and library that can run on this problem."""
    candidates = [
        build_dense_twin(problem),
        *build_other_dense(problem),
        *build_variants(problem),
        build_plain_layer(problem),
        *build_peer_candidates(problem),
    ]
    layers = [candidate for candidate in candidates if isinstance(candidate, Candidate)]
    timer = _Timer(problem, layers)
    forward = protocol.measure(timer.forward())
    train = protocol.measure(timer.train())
    differences = compare_outputs(problem, layers)
    lines = [_summarise(problem, layer, forward, train, differences[layer.name]) for layer in layers]
    if with_loop:
        lines.append(_measure_loop(problem, protocol, forward, train))
    with torch.no_grad():
        load_E = problem.layer.router(problem.x_TD.float(), route_context(problem)).load_E
    shape = problem.shape
    return Row(
        problem=problem,
        lines=tuple(lines),
        skipped=tuple(candidate for candidate in candidates if isinstance(candidate, Skipped)),
        forward_rounds=forward,
        train_rounds=train,
        load_E=tuple(load_E.tolist()),
        gemm_tflops=count_gemm_flops(problem) / forward.median_ms(GEMM) / 1e9,
        least_saved_bytes=min_saved_bytes(
            shape.num_assignments,
            shape.d_model,
            shape.hidden,
            gated=problem.is_gated,
            element_size=problem.x_TD.element_size(),
        ),
    )


class _Timer:
    """Makes timed calls of layers; all gradients are cleared before each."""

    def __init__(self, problem: Problem, layers: Sequence[Candidate]) -> None:
        self.problem = problem
        self.layers = layers
        self.x_TD = problem.x_TD.detach().clone().requires_grad_()
        self.dy_TD = torch.randn_like(problem.x_TD)

    def forward(self) -> dict[str, TimedCall]:
        """Return forward passes without gradients, in evaluation mode."""
        return self._calls(training=False)

    def train(self) -> dict[str, TimedCall]:
        """Return forward and backward passes, in training mode."""
        return self._calls(training=True)

    def _calls(self, *, training: bool) -> dict[str, TimedCall]:
        calls = {layer.name: self._call(layer.forward, layer.module, training=training) for layer in self.layers}
        calls[ROUTER] = self._call(build_router_call(self.problem), self.problem.layer, training=training)
        return calls | {GEMM: self._gemm()}

    def _call(self, forward: Callable[[Tensor], Tensor], module: nn.Module, *, training: bool) -> TimedCall:
        def prepare() -> None:
            self.x_TD.grad = None
            for layer in self.layers:
                layer.module.zero_grad(set_to_none=True)
            module.train(training)

        return TimedCall(call=self._train_call(forward) if training else self._forward_call(forward), prepare=prepare)

    def _forward_call(self, forward: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.no_grad():
                return forward(self.x_TD)

        return call

    def _train_call(self, forward: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        def call() -> object:
            y = forward(self.x_TD)
            y.backward(self.dy_TD if y.shape == self.dy_TD.shape else torch.ones_like(y))  # type: ignore[no-untyped-call]
            return None

        return call

    def _gemm(self) -> TimedCall:
        x_TD, weight_DF = self.problem.x_TD, self.problem.dense.w_in_DF.detach()
        return TimedCall(call=lambda: x_TD @ weight_DF)


def _summarise(
    problem: Problem, layer: Candidate, forward: Timings, train: Timings, difference: tuple[float, float] | None
) -> CandidateResult:
    layer.module.train()
    excluded = [problem.x_TD, *layer.module.parameters(), *problem.layer.parameters()]
    flops = problem.shape.flops
    forward_ms, train_ms = forward.median_ms(layer.name), train.median_ms(layer.name)
    return CandidateResult(
        name=layer.name,
        note=layer.note,
        forward_ms=forward_ms,
        train_ms=train_ms,
        forward=forward.ratio(layer.name, DENSE),
        train=train.ratio(layer.name, DENSE),
        forward_tflops=flops / forward_ms / 1e9,
        train_tflops=TRAIN_FLOPS * flops / train_ms / 1e9,
        saved_bytes=count_saved_bytes(lambda: layer.forward(problem.x_TD), excluded),
        dropped=layer.measure_dropped(),
        difference=None if difference is None else difference[0],
        agrees=None if difference is None else difference[0] <= difference[1],
    )


def compare_outputs(problem: Problem, layers: Sequence[Candidate]) -> Mapping[str, tuple[float, float] | None]:
    """Return for each layer its difference to the output it must equal, and the largest one allowed.

    moebench's own output is compared with the double loop, on the loop's tokens.
    """
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer in layers:
            layer.module.train()
            outputs[layer.name] = layer.forward(problem.x_TD).float()
        loop = build_loop_call(problem)(problem.x_TD[: count_loop_tokens(problem)]).float()
    allowed = MAX_DIFFERENCE[problem.dtype]
    differences: dict[str, tuple[float, float] | None] = {}
    for layer in layers:
        expected_TD = outputs[layer.agrees_with] if layer.agrees_with else None
        differences[layer.name] = (
            None if expected_TD is None else (_difference(outputs[layer.name], expected_TD), allowed)
        )
    return differences | {OURS: (_difference(outputs[OURS][: len(loop)], loop), allowed)}


def _difference(output_TD: Tensor, expected_TD: Tensor) -> float:
    return float((output_TD - expected_TD).abs().max() / expected_TD.abs().max())


def _measure_loop(problem: Problem, protocol: Protocol, forward: Timings, train: Timings) -> CandidateResult:
    """Time the double loop on a few tokens and scale by the number of tokens."""
    tokens = count_loop_tokens(problem)
    part_TD = problem.x_TD[:tokens].detach().clone().requires_grad_()
    loop, scale = build_loop_call(problem), problem.shape.num_tokens / tokens

    def forward_call() -> object:
        with torch.no_grad():
            return loop(part_TD)

    def train_call() -> object:
        return loop(part_TD).sum().backward()  # type: ignore[no-untyped-call]

    def clear() -> None:
        problem.layer.zero_grad(set_to_none=True)
        part_TD.grad = None

    calls = {"forward": TimedCall(call=forward_call), "train": TimedCall(call=train_call, prepare=clear)}
    timings = Protocol(rounds=min(protocol.rounds, 2), device=protocol.device, warm_up=1, tries=1).measure(calls)
    forward_ms, train_ms = scale * timings.median_ms("forward"), scale * timings.median_ms("train")
    flops = problem.shape.flops
    return CandidateResult(
        name=LOOP,
        note=f"measured on {LOOP_ASSIGNMENTS} assignments and scaled" if scale > 1 else "",
        forward_ms=forward_ms,
        train_ms=train_ms,
        forward=Spread.of([forward_ms / forward.median_ms(DENSE)]),
        train=Spread.of([train_ms / train.median_ms(DENSE)]),
        forward_tflops=flops / forward_ms / 1e9,
        train_tflops=TRAIN_FLOPS * flops / train_ms / 1e9,
        saved_bytes=None,
        dropped=0.0,
        difference=None,
        agrees=None,
        approximate=scale > 1,
    )
