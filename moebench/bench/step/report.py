"""The step benchmark in tables, in words, and as JSON."""

from dataclasses import asdict
from typing import Any

from moebench.bench.layer.report import rounds_in_words, rounds_values
from moebench.bench.machine import in_words
from moebench.bench.step.measure import GOAL, PARTED, PLAIN, TRAINER, ArmTimes, Benchmark
from moebench.bench.step.parts import PARTS
from moebench.bench.timing import Spread
from moebench.reporting.formatting import NOTHING, format_count, signed
from moebench.reporting.report import Grid, Report

LEGEND = (
    "adds: wall time of a step in the real trainer (journal, logging and metrics at the configured cadence)"
    f" over that in a plain loop with the same updates, minus 1; quartiles over rounds. Goal: below {GOAL:.0%} of a"
    " step of 100 ms. Evaluations and checkpoints are not part of it.",
    "even load: speed of the plain loop when the experts are dealt round, over that with the router's own load.",
    "parts: a plain loop with timers; router is not counted in dispatch, experts; rest: norms, residuals, auxiliary"
    " values between the parts. timers: what they themselves add.",
)


def build_report(bench: Benchmark) -> Report:
    """Return what was measured."""
    return Report(
        grids=(_overhead_grid(bench), _parts_grid(bench)),
        notes=(*LEGEND, *_rounds(bench), *_unequal(bench), f"Machine: {in_words(bench.machine)}."),
        values=to_values(bench),
    )


def _overhead_grid(bench: Benchmark) -> Grid:
    return Grid(
        title=f"A training step: {bench.name}",
        header=("arm", "plain ms", "trainer", "adds", "quartiles", "tokens/s", "even load"),
        rows=tuple(_overhead_row(arm) for arm in bench.arms),
        marked=any(arm.timings.num_contended for arm in bench.arms),
    )


def _overhead_row(arm: ArmTimes) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{1e3 * arm.seconds[PLAIN]:.1f}",
        f"{1e3 * arm.seconds[TRAINER]:.1f}",
        _percent(arm.overhead.median),
        f"{signed(100 * arm.overhead.low, 1)} … {signed(100 * arm.overhead.high, 1)}",
        format_count(arm.tokens_per_step / arm.seconds[TRAINER]),
        NOTHING if arm.uniform is None else _percent(1 / arm.uniform.median - 1),
    )


def _percent(share: float) -> str:
    return f"{signed(100 * share, 1)} %"


def _parts_grid(bench: Benchmark) -> Grid:
    return Grid(
        title="Where the time of a plain step goes",
        header=("part", *(arm.arm for arm in bench.arms)),
        rows=(
            *((name, *(_part(arm, name) for arm in bench.arms)) for name in PARTS),
            ("timers", *(_percent(arm.timings.ratio(PARTED, PLAIN).median - 1) for arm in bench.arms)),
        ),
    )


def _part(arm: ArmTimes, name: str) -> str:
    seconds = arm.parts[name]
    return f"{100 * seconds / sum(arm.parts.values()):.1f} %" if seconds else NOTHING


def _rounds(bench: Benchmark) -> tuple[str, ...]:
    return tuple(f"{arm.arm}: {rounds_in_words(arm.timings)}." for arm in bench.arms)


def _unequal(bench: Benchmark) -> tuple[str, ...]:
    """Note arms whose two ways did not end at the same weights: their comparison would be of different work."""
    return tuple(
        f"{arm.arm}: NOT THE SAME WORK: weights of trainer and plain loop differ by {arm.weights_differ_by:.1e}."
        for arm in bench.arms
        if arm.weights_differ_by > 0
    )


def to_values(bench: Benchmark) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    settings = asdict(bench.settings)
    settings |= {"experiment": settings["experiment"] and str(settings["experiment"])}
    return {
        "bench": "step",
        "name": bench.name,
        "machine": bench.machine,
        "settings": settings | {"results": str(bench.settings.results)},
        "goal": GOAL,
        "arms": {arm.arm: _arm_values(arm) for arm in bench.arms},
    }


def _arm_values(arm: ArmTimes) -> dict[str, Any]:
    return {
        "seconds": dict(arm.seconds),
        "tokens_per_s": {way: arm.tokens_per_step / seconds for way, seconds in arm.seconds.items()},
        "overhead": asdict(arm.overhead),
        "uniform_over_own_load": _spread(arm.uniform),
        "parts_s": dict(arm.parts),
        "tokens_per_step": arm.tokens_per_step,
        "weights_differ_by": arm.weights_differ_by,
        "rounds": rounds_values(arm.timings),
    }


def _spread(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)
