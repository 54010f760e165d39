import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.run_folders import write_cell

from moebench.errors import UsageError
from moebench.runs.journal import Journal, read_journal
from moebench.tracking.source import list_recorded_experiments


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "0123456789ab" / "journal.jsonl"


def test_appended_points_are_read_back(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(1, {"loss/task": 2.5, "eval/bits_per_byte": 1.25}, time=1000.125)
        journal.append(2, {"loss/task": 2.25})
    points, end = read_journal(path)
    assert [(p.step, dict(p.metrics)) for p in points] == [
        (1, {"loss/task": 2.5, "eval/bits_per_byte": 1.25}),
        (2, {"loss/task": 2.25}),
    ]
    assert points[0].time == 1000.125
    assert end == points[-1].end == path.stat().st_size


def test_reading_continues_from_an_offset(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(1, {"a": 1.0})
        points, offset = read_journal(path)
        assert len(points) == 1
        assert read_journal(path, offset) == ([], offset)
        journal.append(2, {"a": 2.0})
    points, end = read_journal(path, offset)
    assert [p.step for p in points] == [2]
    assert end == path.stat().st_size


def test_a_missing_journal_is_empty(path: Path) -> None:
    assert read_journal(path) == ([], 0)


def test_non_finite_values_keep_the_file_json(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(1, {"nan": math.nan, "up": math.inf, "down": -math.inf})
    assert b'"NaN"' in path.read_bytes()
    (point,), _ = read_journal(path)
    assert math.isnan(point.metrics["nan"])
    assert (point.metrics["up"], point.metrics["down"]) == (math.inf, -math.inf)


@given(cut=st.integers(min_value=0, max_value=200))
def test_a_crash_loses_at_most_the_last_point(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "journal.jsonl"
    with Journal(path) as journal:
        for step in range(4):
            journal.append(step, {"loss/task": 1.0 / (step + 1)}, time=float(step))
    content = path.read_bytes()
    cut = min(cut, len(content))
    os.truncate(path, cut)
    expected = content[:cut].count(b"\n")
    assert len(read_journal(path)[0]) == expected
    with Journal(path) as journal:
        journal.append(9, {"loss/task": 0.5})
    assert [p.step for p in read_journal(path)[0]] == [*range(expected), 9]


@pytest.mark.parametrize(
    "line",
    [b"not json\n", b"{}\n", b"[1]\n", b'{"step": 1, "time": 1, "metrics": {"a@b": 1}}\n', b"\0\0\0\0\n"],
)
def test_other_damage_is_reported_with_file_and_line(path: Path, line: bytes) -> None:
    with Journal(path) as journal:
        journal.append(1, {"a": 1.0})
    first = path.read_bytes()
    path.write_bytes(first + line + first)
    with pytest.raises(UsageError, match=r"journal\.jsonl, line 2: "):
        read_journal(path)
    # The line number does not depend on the offset.
    with pytest.raises(UsageError, match=r"line 2: "):
        read_journal(path, len(first))


def test_a_carriage_return_hides_no_points(path: Path) -> None:
    with Journal(path) as journal:
        for step in range(1, 4):
            journal.append(step, {"a": 1.0})
    content = path.read_bytes()
    path.write_bytes(content.replace(b", ", b",\r", 1))  # white space of JSON
    assert [p.step for p in read_journal(path)[0]] == [1, 2, 3]
    path.write_bytes(content.replace(b'"step"', b'"st\rep"', 1))
    with pytest.raises(UsageError, match=r"journal\.jsonl, line 1: "):
        read_journal(path)
    path.write_bytes(content.replace(b", ", b",\r", 1))
    with Journal(path) as journal:
        journal.truncate_after(2)
    assert [p.step for p in read_journal(path)[0]] == [1, 2]


def test_truncation_leaves_one_value_per_step_after_a_resume(path: Path) -> None:
    with Journal(path) as journal:
        for step in range(1, 8):
            journal.append(step, {"a": float(step)})
    before = path.read_bytes()
    with Journal(path) as journal:
        journal.truncate_after(4)
        kept = path.read_bytes()
        assert before.startswith(kept)
        for step in range(5, 11):
            journal.append(step, {"a": -float(step)})
    assert [p.step for p in read_journal(path)[0]] == [*range(1, 11)]
    assert [p.name for p in path.parent.iterdir()] == ["journal.jsonl"]


@pytest.mark.parametrize("name", ["a@b", "a[0]", "", "/a", "a//b", "../a", "a/", "x" * 251, "ä"])
def test_a_name_that_no_tracker_accepts_is_refused(path: Path, name: str) -> None:
    with Journal(path) as journal:
        with pytest.raises(ValueError, match="metric name"):
            journal.append(1, {name: 1.0})
        journal.append(1, {"eval/load/max_violation:layer 1.x-y_z": 1.0})
    assert len(read_journal(path)[0]) == 1


def test_a_killed_process_loses_no_point(path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from moebench.runs.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for step in range(50): journal.append(step, {'a': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)]).returncode == -9
    assert [p.step for p in read_journal(path)[0]] == [*range(50)]


def test_the_journal_imports_nothing_heavy() -> None:
    program = (
        "import sys, moebench.runs.journal, moebench.tracking.replay, moebench.tracking.tracker\n"
        "import moebench.tracking.ui\n"
        "print([m for m in ('mlflow', 'torch', 'numpy', 'pandas', 'lightning') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


def test_runs_without_a_recorded_experiment_are_gathered_by_name(path: Path) -> None:
    write_cell(path.parent, experiment="probe")
    results = path.parents[2]
    assert list_recorded_experiments(results) == {"probe": {"name": "probe", "cells": [{"id": "0123456789ab"}]}}
    with pytest.raises(UsageError, match="does not exist"):
        list_recorded_experiments(results / "elsewhere")


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.rename(path.with_name("moved")), "replace", "cut"])
def test_points_are_not_lost_in_silence_when_the_file_is(path: Path, lose) -> None:
    journal = Journal(path)
    journal.append(1, {"a": 1.0})
    if lose == "replace":
        path.unlink()
        path.write_text("")
    elif lose == "cut":
        os.truncate(path, 10)
    else:
        lose(path)
    for lost in (lambda: journal.append(2, {"a": 1.0}), journal.close):
        with pytest.raises(UsageError, match=r"journal.jsonl: was (deleted or moved|changed by another program)"):
            lost()


def test_the_summary_is_that_of_the_file(path: Path) -> None:
    with Journal(path) as journal:
        journal.append(1, {"a": 1.0})
        first = journal.summary
        journal.append(2, {"a": 2.0})
        journal.truncate_to(int(first["bytes"]))
        assert journal.summary == first
        journal.append(2, {"a": 2.0})
        assert journal.summary == {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
