"""Measuring one row of the layer benchmark: every variant and library on one problem, interleaved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.bench.layer.peers.register import peer_contestants
from moebench.bench.layer.plain import NAME as PLAIN
from moebench.bench.layer.plain import plain_grouped_mm
from moebench.bench.layer.problem import AGREE_WITHIN, Candidate, Problem, Skipped
from moebench.bench.layer.saved import least_bytes, saved_bytes
from moebench.bench.layer.variants import (
    DENSE,
    LOOP_ASSIGNMENTS,
    OURS,
    dense_twin,
    loop_forward,
    loop_tokens,
    own_variants,
    route_context,
    router_and_plan,
)
from moebench.bench.timing import Protocol, Spread, Timed, Timings

GEMM, ROUTER, LOOP = "gemm", "router+plan", "double loop"
CERTIFIED_FROM = 0.75
"""Share of the plain product's rate that the dense twin must reach; below, the row is marked."""
TRAINING = 3
"""FLOPs of forward and backward as a multiple of forward."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One variant or library in a row; ratios are to the dense twin in the same round."""

    name: str
    note: str
    forward_ms: float
    train_ms: float
    """Forward and backward, with gradients of the input, the gate and all weights."""
    forward: Spread
    train: Spread
    forward_tflops: float
    """Per second, of the useful work: FLOPs of the active experts."""
    train_tflops: float
    saved_bytes: int | None
    dropped: float
    difference: float | None
    """Largest difference to the output it must equal, as a share of the largest output; None: own formula."""
    agrees: bool | None
    approximate: bool = False
    """Measured on a part of the tokens and scaled."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A measured row."""

    problem: Problem
    lines: tuple[Line, ...]
    skipped: tuple[Skipped, ...]
    forward_rounds: Timings
    train_rounds: Timings
    load_E: tuple[int, ...]
    gemm_tflops: float
    least_saved_bytes: int

    @property
    def dense_share(self) -> float:
        """Rate of the dense twin (forward and backward) as a share of a plain product's rate in the same rounds."""
        work = TRAINING * self.problem.shape.flops / gemm_flops(self.problem)
        return work * self.train_rounds.ratio(GEMM, DENSE).median

    @property
    def busy(self) -> bool:
        """Whether others used the machine in rounds that had to be kept."""
        return self.forward_rounds.num_contended > 0 or self.train_rounds.num_contended > 0

    @property
    def certified(self) -> bool:
        """Whether the machine ran near its own speed."""
        return self.dense_share >= CERTIFIED_FROM

    def router_share(self) -> tuple[Spread, Spread]:
        """Return time of router and sorting alone over time of the layer: forward, forward and backward."""
        return self.forward_rounds.ratio(ROUTER, OURS), self.train_rounds.ratio(ROUTER, OURS)

    def saved_by(self, name: str) -> int | None:
        """Return the bytes that a variant keeps for backward; None when it is not in the row."""
        return next((line.saved_bytes for line in self.lines if line.name == name), None)

    @property
    def saved_reference(self) -> int | None:
        """Bytes that plain grouped_mm keeps."""
        return self.saved_by(PLAIN)


def gemm_flops(problem: Problem) -> int:
    """FLOPs of the plain product: the tokens through the dense twin's first matrix."""
    return 2 * problem.shape.num_tokens * problem.dense.w_in_DF.numel()


def measure_row(problem: Problem, protocol: Protocol, *, with_loop: bool = True) -> Row:
    """Measure everything that can run on this problem."""
    candidates = [dense_twin(problem), *own_variants(problem), plain_grouped_mm(problem), *peer_contestants(problem)]
    contestants = [one for one in candidates if isinstance(one, Candidate)]
    timer = _Timer(problem, contestants)
    forward = protocol.measure(timer.forward())
    train = protocol.measure(timer.train())
    differences = compare_outputs(problem, contestants)
    lines = [_line(problem, one, forward, train, differences[one.name]) for one in contestants]
    if with_loop:
        lines.append(_loop_line(problem, protocol, forward, train))
    with torch.no_grad():
        load_E = problem.layer.router(problem.x_TD.float(), route_context(problem)).load_E
    shape = problem.shape
    return Row(
        problem=problem,
        lines=tuple(lines),
        skipped=tuple(one for one in candidates if isinstance(one, Skipped)),
        forward_rounds=forward,
        train_rounds=train,
        load_E=tuple(load_E.tolist()),
        gemm_tflops=gemm_flops(problem) / forward.median_ms(GEMM) / 1e9,
        least_saved_bytes=least_bytes(
            shape.num_assignments,
            shape.d_model,
            shape.hidden,
            gated=problem.gated,
            element_size=problem.x_TD.element_size(),
        ),
    )


class _Timer:
    """Turns layers into timed calls; before each, the gradients of all of them are gone."""

    def __init__(self, problem: Problem, contestants: Sequence[Candidate]) -> None:
        self.problem = problem
        self.contestants = contestants
        self.x_TD = problem.x_TD.detach().clone().requires_grad_()
        self.dy_TD = torch.randn_like(problem.x_TD)

    def forward(self) -> dict[str, Timed]:
        """Return forward passes without gradients, in evaluation mode."""
        timed = {one.name: self._timed(one.forward, one, training=False) for one in self.contestants}
        timed[ROUTER] = self._timed(router_and_plan(self.problem), None, training=False)
        return timed | {GEMM: self._gemm()}

    def train(self) -> dict[str, Timed]:
        """Return forward and backward passes, in training mode."""
        timed = {one.name: self._timed(one.forward, one, training=True) for one in self.contestants}
        timed[ROUTER] = self._timed(router_and_plan(self.problem), None, training=True)
        return timed | {GEMM: self._gemm()}

    def _timed(self, forward: Callable[[Tensor], Tensor], one: Candidate | None, *, training: bool) -> Timed:
        def prepare() -> None:
            self.x_TD.grad = None
            for other in self.contestants:
                other.module.zero_grad(set_to_none=True)
            (one.module if one else self.problem.layer).train(training)

        return Timed(call=self._train_call(forward) if training else self._forward_call(forward), prepare=prepare)

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

    def _gemm(self) -> Timed:
        x_TD, weight_DF = self.problem.x_TD, self.problem.dense.w_in_DF.detach()
        return Timed(call=lambda: x_TD @ weight_DF)


def _line(
    problem: Problem, one: Candidate, forward: Timings, train: Timings, difference: tuple[float, float] | None
) -> Line:
    one.module.train()
    excluded = [problem.x_TD, *one.module.parameters(), *problem.layer.parameters()]
    flops = problem.shape.flops
    forward_ms, train_ms = forward.median_ms(one.name), train.median_ms(one.name)
    return Line(
        name=one.name,
        note=one.note,
        forward_ms=forward_ms,
        train_ms=train_ms,
        forward=forward.ratio(one.name, DENSE),
        train=train.ratio(one.name, DENSE),
        forward_tflops=flops / forward_ms / 1e9,
        train_tflops=TRAINING * flops / train_ms / 1e9,
        saved_bytes=count_saved_bytes(lambda: one.forward(problem.x_TD), excluded),
        dropped=one.dropped(),
        difference=None if difference is None else difference[0],
        agrees=None if difference is None else difference[0] <= difference[1],
    )


def compare_outputs(problem: Problem, contestants: Sequence[Candidate]) -> Mapping[str, tuple[float, float] | None]:
    """Return for each layer its difference to the output it must equal, and the largest one allowed.

    moebench's own output is compared with the double loop, on the loop's tokens.
    """
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        for one in contestants:
            one.module.train()
            outputs[one.name] = one.forward(problem.x_TD).float()
        loop = loop_forward(problem)(problem.x_TD[: loop_tokens(problem)]).float()
    allowed = AGREE_WITHIN[problem.dtype]
    found: dict[str, tuple[float, float] | None] = {
        one.name: (_difference(outputs[one.name], outputs[one.agrees_with]), allowed) if one.agrees_with else None
        for one in contestants
    }
    return found | {OURS: (_difference(outputs[OURS][: len(loop)], loop), allowed)}


def _difference(output_TD: Tensor, expected_TD: Tensor) -> float:
    return float((output_TD - expected_TD).abs().max() / expected_TD.abs().max())


def _loop_line(problem: Problem, protocol: Protocol, forward: Timings, train: Timings) -> Line:
    """Time the double loop on a few tokens; scale by the number of tokens."""
    tokens = loop_tokens(problem)
    part_TD = problem.x_TD[:tokens].detach().clone().requires_grad_()
    loop, scale = loop_forward(problem), problem.shape.num_tokens / tokens

    def forward_call() -> object:
        with torch.no_grad():
            return loop(part_TD)

    def train_call() -> object:
        return loop(part_TD).sum().backward()  # type: ignore[no-untyped-call]

    def clear() -> None:
        problem.layer.zero_grad(set_to_none=True)
        part_TD.grad = None

    variants = {"f": Timed(call=forward_call), "t": Timed(call=train_call, prepare=clear)}
    timings = Protocol(rounds=min(protocol.rounds, 2), device=protocol.device, warm_up=1, tries=1).measure(variants)
    forward_ms, train_ms = scale * timings.median_ms("f"), scale * timings.median_ms("t")
    flops = problem.shape.flops
    return Line(
        name=LOOP,
        note=f"measured on {LOOP_ASSIGNMENTS} assignments and scaled" if scale > 1 else "",
        forward_ms=forward_ms,
        train_ms=train_ms,
        forward=Spread.of([forward_ms / forward.median_ms(DENSE)]),
        train=Spread.of([train_ms / train.median_ms(DENSE)]),
        forward_tflops=flops / forward_ms / 1e9,
        train_tflops=TRAINING * flops / train_ms / 1e9,
        saved_bytes=None,
        dropped=0.0,
        difference=None,
        agrees=None,
        approximate=scale > 1,
    )
