"""The table and the figure of a run's history."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebench.analysis.dynamics.history import CheckpointMeasure, History, LayerHistory
from moebench.analysis.dynamics.history_report import build_history_report, draw_history
from moebench.analysis.dynamics.probe_set import ProbeSet
from moebench.reporting.console import SafeConsole

FIRST = CheckpointMeasure(
    step=0,
    saturation=0.31,
    chance=0.25,
    churn=None,
    changed_tokens=None,
    still_changing=0.9,
    pair_similarity=0.001,
    matched_similarity=0.4,
    coactivation=0.5,
    random_coactivation=(0.41, 0.43),
)
LAST = replace(FIRST, step=1200, coactivation=0.7, random_coactivation=(0.6, 0.62))
SINGLE = replace(FIRST, coactivation=None, random_coactivation=())


@pytest.fixture
def history() -> History:
    """Two layers, the second with one expert per token."""
    layers = {
        name: LayerHistory(
            num_experts=4, checkpoints=checkpoints, strongest_experts=(), coactivation_EE=torch.zeros(0, 0)
        )
        for name, checkpoints in {"1": (FIRST, LAST), "3": (SINGLE, replace(SINGLE, step=1200))}.items()
    }
    return History(title="top_k, seed 0", probe_set=ProbeSet(batches=(), num_tokens=64, digest=""), layers=layers)


def test_each_part_of_a_narrow_table_names_layer_and_step(history: History) -> None:
    console = SafeConsole(width=80)
    with console.capture() as captured:
        console.print(build_history_report(history).tables[0].to_rich())
    headers = [line.split() for line in captured.get().splitlines() if line.split()[:1] == ["layer"]]
    assert len(headers) > 1
    assert all(header[:2] == ["layer", "step"] for header in headers)


def test_random_routings_are_those_of_each_checkpoint(history: History) -> None:
    table = build_history_report(history).tables[0]
    assert table.columns[-1].header == "at random"
    assert [row[-1] for row in table.rows] == ["42.0 %", "61.0 %", "–", "–"]


def test_the_figure_leaves_out_what_a_layer_does_not_have(history: History, tmp_path: Path) -> None:
    assert draw_history(history, tmp_path / "history.png").stat().st_size > 0
