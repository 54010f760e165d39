"""The layer benchmark in tables of ratios, in words, and as JSON."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from moebench.bench.layer.measure import Benchmark
from moebench.bench.layer.plain import NAME as PLAIN
from moebench.bench.layer.row import CERTIFIED_FROM, Line, Row
from moebench.bench.layer.variants import DENSE
from moebench.bench.machine import in_words
from moebench.bench.timing import MAX_CONTENTION, Spread, Timings
from moebench.reporting.formatting import NOTHING, count
from moebench.reporting.report import Grid, Report

HEADER = ("variant", "fwd", "fwd+bwd", "quartiles", "saved", "least", "drops", "same")
LEGEND = (
    "fwd, fwd+bwd: time over that of a dense layer with the same active FLOPs in the same round, median over rounds,"
    " lower is better. fwd is without gradients; fwd+bwd has those of the input, the gate and all weights.",
    f"saved: memory kept for backward, weights and input left out, over that of {PLAIN}. least: the same over the"
    " least that any such layer keeps (each row's input once, its hidden values once).",
    "drops: assignments not computed, whose time is saved. same: the output equals moebench's (moebench's own: a"
    f" double loop's); {NOTHING}: another formula or other drops.",
)


def build_report(bench: Benchmark) -> Report:
    """Return what was measured."""
    absent = [f"Absent: {package}: {reason}." for package, reason in bench.absent.items()]
    return Report(
        grids=tuple(_grid(row) for row in bench.rows),
        notes=(*LEGEND, *_notes_of_lines(bench), *absent, f"Machine: {in_words(bench.machine)}."),
        values=to_values(bench),
    )


def _grid(row: Row) -> Grid:
    tflops = row.problem.device.type == "cuda"
    shape = row.problem.shape
    name = "" if shape.name.count(",") else f"{shape.name}: "
    return Grid(
        title=f"{name}{shape.sizes}, {row.problem.load} load",
        header=(*HEADER, "TFLOP/s") if tflops else HEADER,
        rows=tuple(_cells(row, line, tflops=tflops) for line in row.lines),
        below=_below(row),
        marked=not row.certified or row.busy,
    )


def _cells(row: Row, line: Line, *, tflops: bool) -> tuple[str, ...]:
    about = "≈" if line.approximate else ""
    cells = (
        line.name,
        about + ratio(line.forward.median),
        about + ratio(line.train.median),
        NOTHING if line.approximate or line.name == DENSE else quartiles(line.train),
        _share(line.saved_bytes, row.saved_reference),
        _share(line.saved_bytes, row.least_saved_bytes),
        f"{100 * line.dropped:.1f} %" if line.dropped > 0 else "0",
        NOTHING if line.agrees is None else "yes" if line.agrees else "NO",
    )
    return (*cells, f"{line.train_tflops:.0f}") if tflops else cells


def ratio(value: float) -> str:
    """Format a ratio with two decimals below ten."""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def quartiles(spread: Spread) -> str:
    """Format the quartiles of a ratio."""
    return f"{ratio(spread.low)}–{ratio(spread.high)}"


def _share(part: int | None, whole: int | None) -> str:
    return f"{part / whole:.2f}" if part is not None and whole else NOTHING


def _below(row: Row) -> tuple[str, ...]:
    forward, train = row.router_share()
    verdict = "" if row.certified else f": NOT CERTIFIED, below {CERTIFIED_FROM:.0%}"
    dense_ms = row.train_rounds.median_ms(DENSE)
    lines = [
        f"dense fwd+bwd {dense_ms:.1f} ms, {row.dense_share:.0%} of a plain product's rate here{verdict}",
        f"router and sorting: {forward.median:.1%} of the layer forward, {train.median:.1%} with backward",
        f"fwd: {rounds_in_words(row.forward_rounds)}",
        f"fwd+bwd: {rounds_in_words(row.train_rounds)}",
    ]
    reasons: dict[str, list[str]] = defaultdict(list)
    for one in row.skipped:
        reasons[one.reason].append(one.name)
    return (*lines, *(f"not measured: {', '.join(names)}: {reason}" for reason, names in reasons.items()))


def rounds_in_words(timings: Timings) -> str:
    """Say how many rounds were kept and how busy the machine was."""
    kept = f"{count(len(timings.rounds), 'round')} kept, {timings.num_rejected} rejected"
    if not timings.num_contended:
        return kept
    return f"{kept}; BUSY MACHINE: others used over {MAX_CONTENTION:.0%} of it in {timings.num_contended} of the kept"


def _notes_of_lines(bench: Benchmark) -> tuple[str, ...]:
    notes = {line.name: line.note for row in bench.rows for line in row.lines if line.note}
    return tuple(f"{name}: {note}." for name, note in notes.items())


def to_values(bench: Benchmark) -> dict[str, Any]:
    """Return everything, ready for JSON."""
    return {
        "bench": "layer",
        "machine": bench.machine,
        "settings": asdict(bench.settings),
        "absent": bench.absent,
        "rows": [_row_values(row) for row in bench.rows],
    }


def _row_values(row: Row) -> dict[str, Any]:
    forward, train = row.router_share()
    return {
        "shape": asdict(row.problem.shape),
        "load": row.problem.load,
        "load_E": list(row.load_E),
        "lines": [asdict(line) for line in row.lines],
        "skipped": [asdict(one) for one in row.skipped],
        "router_share": {"forward": asdict(forward), "train": asdict(train)},
        "dense_share_of_gemm": row.dense_share,
        "certified": row.certified,
        "gemm_tflops": row.gemm_tflops,
        "least_saved_bytes": row.least_saved_bytes,
        "rounds": {"forward": rounds_values(row.forward_rounds), "train": rounds_values(row.train_rounds)},
    }


def rounds_values(timings: Timings) -> dict[str, Any]:
    """Return the same for JSON, with the median times in milliseconds."""
    return {
        "kept": len(timings.rounds),
        "rejected": timings.num_rejected,
        "contended": timings.num_contended,
        "others": [one.others for one in timings.rounds],
        "ms": {name: timings.median_ms(name) for name in timings.rounds[0].seconds},
    }
