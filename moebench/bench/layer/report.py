"""The report of the layer benchmark: tables of ratios, notes, JSON values."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from moebench.bench.layer.measure import Benchmark
from moebench.bench.layer.plain import NAME as PLAIN
from moebench.bench.layer.row import MIN_DENSE_SHARE, CandidateResult, Row
from moebench.bench.layer.variants import DENSE
from moebench.bench.machine import describe_machine
from moebench.bench.rounds import describe_rounds, format_quartiles, format_ratio, rounds_to_dict
from moebench.reporting.formatting import MISSING, format_percent
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

HEADERS = ("fwd", "fwd+bwd", "quartiles", "saved", "least", "drops", "same")
LEGEND = (
    "fwd, fwd+bwd: time over that of a dense layer with the same active FLOPs in the same round, median over rounds,"
    " lower is better. fwd is without gradients; fwd+bwd has those of the input, the gate and all weights.",
    f"saved: memory kept for backward, weights and input left out, over that of {PLAIN}. least: the same over the"
    " least that any such layer keeps (each row's input once, its hidden values once).",
    "drops: assignments not computed, whose time is saved. same: the output equals moebench's (moebench's own: a"
    f" double loop's); {MISSING}: another formula or other drops.",
)


def build_report(bench: Benchmark) -> Report:
    """Return the report of a measured benchmark."""
    absent = [f"Absent: {package}: {reason}." for package, reason in bench.absent.items()]
    return Report(
        tables=tuple(_row_table(row) for row in bench.rows),
        notes=(*LEGEND, *_line_notes(bench), *absent, f"Machine: {describe_machine(bench.machine)}."),
        values=_to_dict(bench),
    )


def _row_table(row: Row) -> Table:
    is_gpu = row.problem.device.type == "cuda"
    shape = row.problem.shape
    name = "" if shape.name.count(",") else f"{shape.name}: "
    headers = (*HEADERS, "TFLOP/s") if is_gpu else HEADERS
    return Table(
        title=f"{name}{shape.sizes}, {row.problem.load} load",
        columns=(Column(header="variant", align="left"), *number_columns(*headers)),
        rows=tuple(_cells(row, line, has_tflops=is_gpu) for line in row.lines),
        notes=_row_notes(row),
        marked=not row.is_certified or row.is_busy,
    )


def _cells(row: Row, line: CandidateResult, *, has_tflops: bool) -> tuple[str, ...]:
    about = "≈" if line.approximate else ""
    cells = (
        line.name,
        about + format_ratio(line.forward.median),
        about + format_ratio(line.train.median),
        MISSING if line.approximate or line.name == DENSE else format_quartiles(line.train),
        _format_bytes_ratio(line.saved_bytes, row.saved_reference),
        _format_bytes_ratio(line.saved_bytes, row.least_saved_bytes),
        format_percent(line.dropped) if line.dropped > 0 else "0",
        MISSING if line.agrees is None else "yes" if line.agrees else "NO",
    )
    return (*cells, f"{line.train_tflops:.0f}") if has_tflops else cells


def _format_bytes_ratio(num_bytes: int | None, reference: int | None) -> str:
    return f"{num_bytes / reference:.2f}" if num_bytes is not None and reference else MISSING


def _row_notes(row: Row) -> tuple[str, ...]:
    forward, train = row.router_share()
    verdict = "" if row.is_certified else f": NOT CERTIFIED, below {MIN_DENSE_SHARE:.0%}"
    dense_ms = row.train_rounds.median_ms(DENSE)
    notes = [
        f"dense fwd+bwd {dense_ms:.1f} ms, {row.dense_share:.0%} of a plain product's rate here{verdict}",
        f"router and sorting: {forward.median:.1%} of the layer forward, {train.median:.1%} with backward",
        f"fwd: {describe_rounds(row.forward_rounds)}",
        f"fwd+bwd: {describe_rounds(row.train_rounds)}",
    ]
    names_by_reason: dict[str, list[str]] = defaultdict(list)
    for skipped in row.skipped:
        names_by_reason[skipped.reason].append(skipped.name)
    return (*notes, *(f"not measured: {', '.join(names)}: {reason}" for reason, names in names_by_reason.items()))


def _line_notes(bench: Benchmark) -> tuple[str, ...]:
    notes = {line.name: line.note for row in bench.rows for line in row.lines if line.note}
    return tuple(f"{name}: {note}." for name, note in notes.items())


def _to_dict(bench: Benchmark) -> dict[str, Any]:
    return {
        "bench": "layer",
        "machine": bench.machine,
        "settings": asdict(bench.settings),
        "absent": bench.absent,
        "rows": [_row_to_dict(row) for row in bench.rows],
    }


def _row_to_dict(row: Row) -> dict[str, Any]:
    forward, train = row.router_share()
    return {
        "shape": asdict(row.problem.shape),
        "load": row.problem.load,
        "load_E": list(row.load_E),
        "lines": [asdict(line) for line in row.lines],
        "skipped": [asdict(skipped) for skipped in row.skipped],
        "router_share": {"forward": asdict(forward), "train": asdict(train)},
        "dense_share_of_gemm": row.dense_share,
        "certified": row.is_certified,
        "gemm_tflops": row.gemm_tflops,
        "least_saved_bytes": row.least_saved_bytes,
        "rounds": {"forward": rounds_to_dict(row.forward_rounds), "train": rounds_to_dict(row.train_rounds)},
    }
