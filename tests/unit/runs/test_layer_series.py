"""The series of layers: what is computed from a line, the file, and damage to it."""

import contextlib
import json
import os
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.errors import UsageError
from moebench.parallel.manifest import RecordPrefix
from moebench.routing import metrics
from moebench.runs import layer_series
from moebench.runs.folder import RunFolder
from moebench.runs.layer_series import (
    LayerPoint,
    LayerValues,
    format_layer_line,
    iter_layer_series,
    list_layers,
    parse_layer_line,
    read_layer_series,
    read_thinned_series,
    select_layers,
)
from moebench.runs.recorder import RunRecorder

LAYER = LayerValues(
    load=(6, 2, 0, 4),
    tokens=12,
    dropped=3,
    rerouted=1,
    unserved=2,
    experts_per_token=0.75,
    flops_per_token=1234.5,
    entropy=0.5,
    logit_max=3.25,
    logit_std=None,
)


def write_series(path: Path, num_points: int) -> None:
    path.write_bytes(b"".join(format_layer_line(step, {"1": LAYER}) + b"\n" for step in range(1, num_points + 1)))


def test_shares_and_quantiles_of_a_layer() -> None:
    assert LAYER.assignments == 12
    assert LAYER.max_violation == 1.0  # 6 over a mean of 3
    assert LAYER.dead_experts == 1
    assert (LAYER.drop_rate, LAYER.unserved_rate) == (3 / 12, 2 / 12)
    assert [LAYER.load_quantile(share) for share in (0, 0.5, 1)] == [0.0, 1.0, 2.0]  # 0, (2 + 4) / 2 and 6 over 3
    assert LAYER.load_quantile(0.1) == pytest.approx(0.2)  # 0.3 of the way from 0 to 2, over 3


def test_a_layer_without_assignments_has_no_load() -> None:
    empty = replace(LAYER, load=(0, 0), tokens=0)
    assert (empty.max_violation, empty.dead_experts, empty.drop_rate, empty.load_quantile(1)) == (0.0, 2, 3.0, 0.0)


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=20))
def test_values_are_those_of_the_routing_metrics(load: list[int]) -> None:
    layer, load_E = replace(LAYER, load=tuple(load)), torch.tensor(load)
    assert layer.max_violation == pytest.approx(metrics.max_violation(load_E), abs=1e-9)
    assert layer.dead_experts == metrics.count_dead_experts(load_E)
    assert layer_series.DEAD_SHARE == metrics.DEAD_SHARE


def test_a_line_gives_what_was_written() -> None:
    line = format_layer_line(20, {"encoder.1.attention": LAYER, "3": replace(LAYER, entropy=None)})
    point = parse_layer_line(line, end=7)
    assert (point.step, point.end) == (20, 7)
    assert point.layers == {"encoder.1.attention": LAYER, "3": replace(LAYER, entropy=None)}
    assert list_layers([point]) == ["encoder.1.attention", "3"]


def test_numbers_are_stored_with_seven_digits() -> None:
    line = format_layer_line(1, {"0": replace(LAYER, experts_per_token=2 / 3)})
    assert b'"experts_per_token":0.6666667,' in line


def test_a_torn_last_line_is_left_for_later(tmp_path: Path) -> None:
    path = tmp_path / "layers.jsonl"
    write_series(path, 3)
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    points, offset = read_layer_series(path)
    assert [point.step for point in points] == [1, 2]
    path.write_bytes(content)
    points, offset = read_layer_series(path, offset)
    assert [point.step for point in points] == [3]
    assert offset == len(content)


def test_a_missing_file_has_no_points(tmp_path: Path) -> None:
    assert read_layer_series(tmp_path / "layers.jsonl") == ([], 0)
    assert read_thinned_series(tmp_path / "layers.jsonl") == []


@pytest.mark.parametrize(("num_points", "expected"), [(3, 3), (8, 5), (1000, 6)])
def test_a_long_series_is_thinned_while_it_is_read(tmp_path: Path, num_points: int, expected: int) -> None:
    write_series(tmp_path / "layers.jsonl", num_points)
    steps = [point.step for point in read_thinned_series(tmp_path / "layers.jsonl", max_points=8)]
    assert steps[0] == 1
    assert steps[-1] == num_points
    assert len(steps) <= 9
    assert len(steps) >= expected - 1
    assert len({b - a for a, b in pairwise(steps[:-1])}) <= 1


def damaged(**changes: object) -> bytes:
    """Return a line in which values of the layer are replaced."""
    values = json.loads(format_layer_line(1, {"1": LAYER}))
    values["layers"]["1"] |= changes
    return json.dumps(values).encode()


@pytest.mark.parametrize(
    "line",
    [
        b"nonsense",
        b"[]",
        b"{}",
        b'{"step": 1, "layers": []}',
        b'{"step": -1, "layers": {}}',
        b'{"step": 1e999, "layers": {}}',
        b'{"step": 1, "layers": {"\\u001b[31m": {}}}',
        b'{"step": 1, "layers": {"1": {}}}',
        b"[" * 100_000,
        damaged(load=[]),
        damaged(load=[True]),
        damaged(load=[1.5]),
        damaged(load=[-1]),
        damaged(load=[0] * 65_537),
        damaged(tokens="3"),
        damaged(entropy="x"),
        damaged(entropy=float("nan")),
        damaged(flops_per_token=None),
        damaged(flops_per_token=10**400),
        json.dumps({"step": 1, "layers": {str(number): {} for number in range(1025)}}).encode(),
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "layers.jsonl"
    path.write_bytes(format_layer_line(1, {"1": LAYER}) + b"\n" + line + b"\n")
    with pytest.raises(UsageError, match=r"layers\.jsonl, line that ends at byte") as error:
        list(iter_layer_series(path))
    assert "\n" not in str(error.value)
    assert str(error.value).isprintable()


def test_a_line_without_end_and_a_pipe_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "layers.jsonl"
    path.write_bytes(b" " * 1000)
    monkeypatch.setattr(layer_series, "MAX_LINE_BYTES", 100)
    with pytest.raises(UsageError, match="has a line of more than"):
        list(iter_layer_series(path))
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is not a plain file"):
        list(iter_layer_series(path))


def test_a_rewind_drops_the_steps_after_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with RunRecorder(folder) as recorder:
        recorder.record_layers(1, {"1": LAYER})
        records = recorder.describe()
        recorder.record_layers(2, {"1": LAYER})
    assert records["layers.jsonl"]["bytes"] < folder.layers.stat().st_size
    prefixes = {name: RecordPrefix(**values) for name, values in records.items()}
    for known, expected in ((prefixes, [1]), ({"journal.jsonl": prefixes["journal.jsonl"]}, [])):
        with RunRecorder(folder) as recorder:
            recorder.rewind(1, known)
        assert [point.step for point in iter_layer_series(folder.layers)] == expected


def test_a_rewind_without_records_keeps_the_steps_up_to_it(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with RunRecorder(folder) as recorder:
        for step in (1, 2, 3):
            recorder.append(step, {"loss/task": 1.0})
            recorder.record_layers(step, {"1": LAYER})
        recorder.rewind(2, {})
    assert [point.step for point in iter_layer_series(folder.layers)] == [1, 2]


def test_a_file_that_was_deleted_meanwhile_ends_the_run(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with contextlib.suppress(UsageError), RunRecorder(folder) as recorder:
        recorder.record_layers(1, {"1": LAYER})
        folder.layers.unlink()
        with pytest.raises(UsageError, match="was deleted or moved during the run"):
            recorder.record_layers(2, {"1": LAYER})


@pytest.mark.parametrize(("worst", "expected"), [(5, ["0", "4", "5", "9"]), (0, ["0", "1", "5", "9"])])
def test_the_most_uneven_layer_is_among_those_selected(worst: int, expected: list[str]) -> None:
    even, uneven = replace(LAYER, load=(3, 3, 3, 3)), replace(LAYER, load=(12, 0, 0, 0))
    layers = {str(number): uneven if number == worst else even for number in range(10)}
    points = [LayerPoint(step=1, layers=layers)]
    assert select_layers(points, 4) == expected
    assert select_layers(points, 10) == list(layers)
