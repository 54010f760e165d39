"""Tables of the benchmarks on given numbers."""

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console

from moebench.bench.layer.measure import Benchmark, Settings
from moebench.bench.layer.peers.register import PACKAGE, PEERS
from moebench.bench.layer.problem import Skipped, make_problem
from moebench.bench.layer.report import build_report
from moebench.bench.layer.row import GEMM, ROUTER, CandidateResult, Row
from moebench.bench.layer.shapes import parse_shape
from moebench.bench.rounds import describe_rounds
from moebench.bench.timing import Round, Spread, Timings

MACHINE = {"device": "cpu", "processor": "a CPU", "threads": 2, "cores": 2, "torch": "2.13", "allocator": "default"}


def timings(*, others: float = 0.0, gemm_s: float = 0.5) -> Timings:
    seconds = {"dense": 1.0, "moebench": 2.0, ROUTER: 0.1, GEMM: gemm_s}
    return Timings.choose([Round(seconds=seconds, others=others)] * 3, num_rounds=3)


def line(name: str, ratio: float, **changes: object) -> CandidateResult:
    spread = Spread(median=ratio, low=ratio - 0.1, high=ratio + 0.1)
    given = {"note": "", "forward_ms": 1.0, "train_ms": ratio, "forward": spread, "train": spread}
    given |= {"forward_tflops": 0.1, "train_tflops": 0.1, "saved_bytes": 3000, "dropped": 0.0}
    return CandidateResult(name=name, **given | {"difference": None, "agrees": None} | changes)  # type: ignore[arg-type]


def row(**changes: object) -> Row:
    problem = make_problem(parse_shape("32,8,16,4,2,swiglu"), "router", seed=0, device=torch.device("cpu"))
    lines = (
        line("dense", 1.0),
        line("moebench", 2.0, agrees=True, saved_bytes=1500),
        line("plain grouped_mm", 1.5, agrees=False),
        line("double loop", 321.0, approximate=True, saved_bytes=None),
        line("Switch", 1.25, dropped=0.125),
    )
    given = {"lines": lines, "skipped": (Skipped(name="x", reason="why"), Skipped(name="y", reason="why"))}
    given |= {"forward_rounds": timings(), "train_rounds": timings(), "load_E": (16,) * 4}
    return Row(problem=problem, **given | {"gemm_tflops": 0.1, "least_saved_bytes": 1000} | changes)  # type: ignore[arg-type]


def benchmark(*rows: Row) -> Benchmark:
    return Benchmark(rows=rows, absent={"peer": "not installed"}, machine=MACHINE, settings=Settings())


def test_cells() -> None:
    (table,) = build_report(benchmark(row())).tables
    assert table.rows[0] == ("dense", "1.00", "1.00", "–", "1.00", "3.00", "0", "–")
    assert table.rows[1] == ("moebench", "2.00", "2.00", "1.90–2.10", "0.50", "1.50", "0", "yes")
    assert table.rows[2][-1] == "NO"
    assert table.rows[3] == ("double loop", "≈321", "≈321", "–", "–", "–", "0", "–")
    assert table.rows[4][-2] == "12.5 %"
    assert "not measured: x, y: why" in table.notes
    assert any("router and sorting: 5.0% of the layer forward" in text for text in table.notes)


def test_a_row_is_certified_by_the_rate_of_a_plain_product() -> None:
    # swiglu: three products of 8 x 32 against a plain one of 8 x 64: dense does 3 · 1.5 = 4.5 times its work.
    assert row(train_rounds=timings(gemm_s=0.2)).dense_share == pytest.approx(0.9)
    slow = row(train_rounds=timings(gemm_s=0.1))
    assert slow.dense_share == pytest.approx(0.45)
    assert not slow.is_certified
    (table,) = build_report(benchmark(slow)).tables
    assert table.marked
    assert any("45% of a plain product's rate here: NOT CERTIFIED, below 75%" in text for text in table.notes)


def test_a_busy_machine_is_marked() -> None:
    (table,) = build_report(benchmark(row(forward_rounds=timings(others=0.5)))).tables
    assert table.marked
    text = "3 rounds kept, 0 rejected; BUSY MACHINE: others used over 8% of it in 3 of the kept"
    assert describe_rounds(timings(others=0.5)) == text
    assert describe_rounds(timings()) == "3 rounds kept, 0 rejected"


def test_the_table_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(build_report(benchmark(row())).to_rich())
    assert "…" not in console.file.getvalue()  # type: ignore[attr-defined]


def test_markdown_and_json() -> None:
    report = build_report(benchmark(row()))
    assert "| moebench | 2.00 | 2.00 | 1.90–2.10 | 0.50 | 1.50 | 0 | yes |" in report.to_markdown()
    values = json.loads(report.to_json())
    assert values["absent"] == {"peer": "not installed"}
    assert values["rows"][0]["lines"][1]["train"]["median"] == 2.0
    assert values["rows"][0]["rounds"]["train"] == {
        "kept": 3,
        "rejected": 0,
        "contended": 0,
        "others": [0.0, 0.0, 0.0],
        "ms": {"dense": 1000.0, "moebench": 2000.0, ROUTER: 100.0, GEMM: 500.0},
    }


def test_every_adapter_of_a_library_is_a_module() -> None:
    for peer in PEERS:
        assert peer.adapter is None or importlib.util.find_spec(f"{PACKAGE}.{peer.adapter}") is not None
        assert peer.adapter is not None or peer.reason
