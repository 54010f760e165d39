"""What a tracker is told of layers: the first collapse, and a table that has a limit."""

import dataclasses
from pathlib import Path

import pytest

from moebench.runs.journal import Point
from moebench.runs.layer_series import LayerValues, format_layer_line
from moebench.tracking import messages

LAYER = LayerValues(
    load=(1,) * 10, tokens=10, dropped=0, rerouted=0, unserved=0, experts_per_token=1.0, flops_per_token=1.0
)


def point(step: int, **metrics: float) -> Point:
    return Point(step=step, time=0.0, metrics={name.replace("__", "/"): v for name, v in metrics.items()}, end=0)


def test_the_first_collapse_names_all_its_layers() -> None:
    points = [
        point(5, loss__task=1.0),
        point(10, collapse__layers=2.0, collapse__1__expert=3.0, collapse__1__share=1.0, collapse__4__expert=0.0),
        point(15, collapse__2__expert=5.0),
    ]
    assert messages.describe_collapses(points) == "step 10: layer 1, expert 3; layer 4, expert 0"
    assert messages.describe_collapses(points[:1]) == ""


def test_a_table_of_a_long_run_is_thinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_LAYER_NUMBERS", 1000)
    layers = {"0": LAYER, "1": dataclasses.replace(LAYER, entropy=0.5)}
    path = tmp_path / "layers.jsonl"
    path.write_bytes(b"".join(format_layer_line(step, layers) + b"\n" for step in range(1, 101)))
    table = messages._layers_table(path)
    assert len(table["data"]) * (len(table["columns"]) + 9) <= 1200
    assert [table["data"][index][0] for index in (0, -1)] == [1, 100]
