"""The report of the step benchmark."""

from dataclasses import asdict
from typing import Any

from moebench.bench.machine import describe_machine
from moebench.bench.rounds import describe_rounds, rounds_to_dict
from moebench.bench.step.measure import GOAL, PLAIN, TELEMETRY_GOAL, TIMED, TRAINER, ArmTimes, Benchmark
from moebench.bench.step.parts import PARTS
from moebench.bench.timing import Spread
from moebench.reporting.formatting import MISSING, format_count, format_percent, format_signed
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

LEGEND = (
    "adds: wall time of a step in the real trainer (journal, logging and metrics at the configured cadence)"
    f" over that in a plain loop with the same updates, minus 1; quartiles over rounds. Goal: below {GOAL:.0%} of a"
    " step of 100 ms. Evaluations and checkpoints are not part of it.",
    "telemetry: wall time of the trainer over that without the series of each layer and the alarm of collapses, minus"
    f" 1; quartiles. Goal: below {TELEMETRY_GOAL:.0%}.",
    "MFU: model FLOPs utilization of the trainer: three times the forward FLOPs of the active parts, attention over the"
    " whole sequence, without recomputation and optimizer, over a peak.",
    "even load: speed of the plain loop when the load is forced to be even, over that with the router's own load.",
    "parts: a plain loop with timers; router is not counted in dispatch, experts; rest: norms, residuals, auxiliary"
    " values between the parts. timers: their own time.",
)


def build_report(bench: Benchmark) -> Report:
    """Return the report of a measured benchmark."""
    return Report(
        tables=(_overhead_table(bench), _parts_table(bench)),
        notes=(
            *LEGEND,
            *_peak_notes(bench),
            *_round_notes(bench),
            *_weight_notes(bench),
            f"Machine: {describe_machine(bench.machine)}.",
        ),
        values=_to_dict(bench),
    )


def _overhead_table(bench: Benchmark) -> Table:
    headers = ("plain ms", "trainer", "adds", "quartiles", "telemetry", "quartiles ", "tokens/s", "MFU", "even load")
    return Table(
        title=f"A training step: {bench.name}",
        columns=(Column(header="arm", align="left"), *number_columns(*headers)),
        rows=tuple(_overhead_row(arm) for arm in bench.arms),
        marked=any(arm.timings.num_contended for arm in bench.arms),
    )


def _overhead_row(arm: ArmTimes) -> tuple[str, ...]:
    return (
        arm.arm,
        f"{1e3 * arm.seconds[PLAIN]:.1f}",
        f"{1e3 * arm.seconds[TRAINER]:.1f}",
        _format_overhead(arm.overhead.median),
        _format_quartiles(arm.overhead),
        MISSING if arm.telemetry is None else _format_overhead(arm.telemetry.median),
        MISSING if arm.telemetry is None else _format_quartiles(arm.telemetry),
        format_count(arm.tokens_per_step / arm.seconds[TRAINER]),
        format_percent(arm.mfu),
        MISSING if arm.uniform is None else _format_overhead(1 / arm.uniform.median - 1),
    )


def _format_quartiles(spread: Spread) -> str:
    return f"{format_signed(100 * spread.low, 1)} … {format_signed(100 * spread.high, 1)}"


def _format_overhead(share: float) -> str:
    return f"{format_signed(100 * share, 1)} %"


def _parts_table(bench: Benchmark) -> Table:
    return Table(
        title="Where the time of a plain step goes",
        columns=(Column(header="part", align="left"), *number_columns(*(arm.arm for arm in bench.arms))),
        rows=(
            *((name, *(_format_part(arm, name) for arm in bench.arms)) for name in PARTS),
            ("timers", *(_format_overhead(arm.timings.ratio(TIMED, PLAIN).median - 1) for arm in bench.arms)),
        ),
    )


def _format_part(arm: ArmTimes, name: str) -> str:
    seconds = arm.parts[name]
    return format_percent(seconds / sum(arm.parts.values())) if seconds else MISSING


def _peak_notes(bench: Benchmark) -> tuple[str, ...]:
    peaks: dict[str, list[str]] = {}
    for arm in bench.arms:
        peaks.setdefault(arm.peak.describe(), []).append(arm.arm)
    return tuple(f"Peak of {', '.join(arms)}: {text}." for text, arms in peaks.items())


def _round_notes(bench: Benchmark) -> tuple[str, ...]:
    return tuple(f"{arm.arm}: {describe_rounds(arm.timings)}." for arm in bench.arms)


def _weight_notes(bench: Benchmark) -> tuple[str, ...]:
    """Return a note for each arm whose trainer and plain loop ended at different weights: they did different work."""
    return tuple(
        f"{arm.arm}: NOT THE SAME WORK: weights of trainer and plain loop differ by {arm.weights_differ_by:.1e}."
        for arm in bench.arms
        if arm.weights_differ_by > 0
    )


def _to_dict(bench: Benchmark) -> dict[str, Any]:
    settings = asdict(bench.settings)
    settings |= {"experiment": settings["experiment"] and str(settings["experiment"])}
    return {
        "bench": "step",
        "name": bench.name,
        "machine": bench.machine,
        "settings": settings | {"results": str(bench.settings.results)},
        "goal": GOAL,
        "arms": {arm.arm: _arm_to_dict(arm) for arm in bench.arms},
    }


def _arm_to_dict(arm: ArmTimes) -> dict[str, Any]:
    return {
        "seconds": dict(arm.seconds),
        "tokens_per_s": {name: arm.tokens_per_step / seconds for name, seconds in arm.seconds.items()},
        "overhead": asdict(arm.overhead),
        "telemetry": _spread_to_dict(arm.telemetry),
        "uniform_over_own_load": _spread_to_dict(arm.uniform),
        "mfu": arm.mfu,
        "peak": asdict(arm.peak),
        "parts_s": dict(arm.parts),
        "tokens_per_step": arm.tokens_per_step,
        "weights_differ_by": arm.weights_differ_by,
        "rounds": rounds_to_dict(arm.timings),
    }


def _spread_to_dict(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else asdict(value)
