"""The summary of an experiment is written and read back; a damaged or huge one is one line."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebench.errors import UsageError
from moebench.runs.experiment_summary import (
    MAX_ARMS,
    ArmMean,
    ExperimentSummary,
    SummaryTable,
    read_summary,
    summary_path,
    write_summary,
)

SUMMARY = ExperimentSummary(
    metric="nats",
    split="test",
    baseline="dense",
    num_done=6,
    sentences=("switch is better.",),
    arms={"dense": ArmMean(mean=2.0), "switch": ArmMean(mean=1.9, difference=-0.1)},
    tables=(SummaryTable(title="Quality", columns=("arm", "mean"), rows=(("dense", "2.0"), ("switch", "1.9"))),),
)


def test_a_summary_is_read_back(tmp_path: Path) -> None:
    assert read_summary(tmp_path, "x") is None
    (tmp_path / "experiments").mkdir()
    write_summary(tmp_path, "x", SUMMARY)
    assert read_summary(tmp_path, "x") == SUMMARY


def test_a_changed_digit_is_damage(tmp_path: Path) -> None:
    (tmp_path / "experiments").mkdir()
    write_summary(tmp_path, "x", SUMMARY)
    path = summary_path(tmp_path, "x")
    path.write_text(path.read_text().replace("1.9", "1.8"))
    with pytest.raises(UsageError, match="does not match its checksum"):
        read_summary(tmp_path, "x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 9}, "'format' is 9"),
        ({"sentences": [1]}, "'sentences' must be a list of texts"),
        ({"arms": {"a": {"mean": float("nan")}}}, "expected a finite number"),
        ({"arms": {"a": 3}}, "an arm is not an object"),
        ({"arms": {str(n): {} for n in range(MAX_ARMS + 1)}}, "'arms' has 1001 entries"),
        ({"tables": [{"title": "t", "columns": ["a"], "rows": [["1", "2"]]}]}, "rows of another length"),
        ({"tables": [3]}, "a table is not an object"),
        ({"num_done": None}, "'num_done' is 'None'"),
    ],
)
def test_damage_is_one_line_with_the_file(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    path = summary_path(tmp_path, "x")
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(SUMMARY.to_dict() | change))
    with pytest.raises(UsageError) as refusal:
        read_summary(tmp_path, "x")
    assert str(refusal.value).startswith(f"{path}: damaged (")
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"\xff", b"[" * 100_000])
def test_a_file_of_anything_else_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = summary_path(tmp_path, "x")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        read_summary(tmp_path, "x")
