"""Ladders of sizes from results folders: several experiments, one grid over sizes, refusals."""

import json
from dataclasses import replace

import pytest
from support.ladder_results import write_experiment, write_size
from support.run_folders import write_data_digests
from support.tuned_results import write_failed

from moebench.analysis.pooled.effective_report import build_ladder_report
from moebench.analysis.pooled.experiments import name_uniquely
from moebench.analysis.pooled.ladder import read_ladder
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder

WIDTHS = (16, 32, 64)


@pytest.fixture
def ladder(tmp_path):
    """Three experiments over 2 decades; switch is worth 1.5 times the compute, and trains 1.25 times slower."""
    experiments = [write_experiment(tmp_path, f"S{n}", f"model.d_model={width}") for n, width in enumerate(WIDTHS)]
    for number, experiment in enumerate(experiments):
        write_size(tmp_path / "results", experiment, 13.0 + number, {"switch": 1.5}, {"switch": 12.5})
    return experiments


def test_a_planted_factor_is_found(ladder, tmp_path):
    report = build_ladder_report(read_ladder(ladder, tmp_path / "results"))
    ((arm, pairs, compute, _, wall_clock, *by_size),) = report.tables[0].rows
    assert (arm, pairs, len(by_size)) == ("switch", "9", 3)
    values = report.values["arms"]["switch"]
    low, high = values["compute"]["interval"]
    assert low < 1.5 < high < 1.8
    assert compute == f"{values['compute']['value']:.2f}x [{low:.2f}, {high:.2f}]"
    assert values["wall_clock"]["value"] == pytest.approx(0.8 * values["compute"]["value"])
    assert wall_clock.startswith(f"{values['wall_clock']['value']:.2f}x")
    assert report.values["sizes"] == pytest.approx({"S0": 1e13, "S1": 1e14, "S2": 1e15})
    assert report.notes[0].endswith("wall clock (3 sizes, 2.0 decades).")
    assert values["p_holm"] < 0.05
    json.dumps(report.values, allow_nan=False)


def test_sizes_below_trivial_baselines_are_marked(ladder, tmp_path):
    # The text repeats 20 characters, so trigrams predict it well and the planted losses do not.
    results = tmp_path / "results"
    for experiment in ladder[:2]:
        write_data_digests(results, experiment.cells)
    for cell in ladder[1].cells:
        folder = RunFolder.of(results, cell.id)
        folder.write_result(replace(folder.read_result(), metrics={"bits_per_byte": 1e-3}))
    read = read_ladder(ladder, results)
    # S2: its runs were evaluated on other data, so nothing is known.
    assert {size.name: size.is_below_trivial for size in read.sizes} == {"S0": True, "S1": False, "S2": None}
    report = build_ladder_report(read)
    assert report.values["below_trivial_baselines"] == {"S0": True, "S1": False, "S2": None}
    marks = [note for note in report.notes if "below trivial" in note]
    assert marks == ["S0: below trivial baselines: a ranking at this size says little"]


def test_times_at_different_load_give_no_wall_clock(ladder, tmp_path):
    folder = tmp_path / "results" / "runs" / ladder[1].cells[0].id
    (folder / "environment.json").write_text(json.dumps({"processor": "y", "device": "cpu", "cores": 1}))
    report = build_ladder_report(read_ladder(ladder, tmp_path / "results"))
    assert report.values["arms"]["switch"]["wall_clock"] is None
    assert any("no wall clock: at S1: measured on different hardware" in note for note in report.notes)
    report = build_ladder_report(read_ladder(ladder, tmp_path / "results", ignore_conditions=True))
    assert report.values["arms"]["switch"]["wall_clock"]["value"] > 0
    assert any("times are not comparable: at S1" in note for note in report.notes)


def test_a_short_ladder_is_refused_with_its_decades(ladder, tmp_path):
    with pytest.raises(UsageError, match=r"2 sizes over 1.0 decades .*\(1.0e\+13 to 1.0e\+14\); needed: 3 sizes over"):
        build_ladder_report(read_ladder(ladder[:2], tmp_path / "results"))


def test_diverged_runs_are_named_and_give_no_p(ladder, tmp_path):
    [cell] = [cell for cell in ladder[2].cells if (cell.arm, cell.seed) == ("switch", 1)]
    write_failed(tmp_path / "results", cell)
    report = build_ladder_report(read_ladder(ladder, tmp_path / "results"))
    assert report.values["arms"]["switch"]["p_holm"] is None
    assert any("1 run of the arm or the baseline diverged" in note for note in report.notes)
    assert report.tables[0].rows[0][1] == "8"


def test_an_arm_that_is_not_at_every_size(ladder, tmp_path):
    for experiment in ladder[1:]:
        for cell in experiment.cells:
            if cell.arm == "switch":
                (tmp_path / "results" / "runs" / cell.id / "result.json").unlink()
    report = build_ladder_report(read_ladder(ladder, tmp_path / "results"))
    assert report.tables[0].rows[0][2] == "1 size, 3 needed"
    assert report.notes[0] == "switch: no effective compute (1 size, 3 needed)."


SIZES = [
    {"label": f"d_model={w}", "model.d_model": w, "train.steps": 10 * w, "train.learning_rate": 0.1 / w} for w in WIDTHS
]


@pytest.mark.parametrize("axis", [{"model.d_model": [*WIDTHS]}, {"arm": SIZES}])
def test_one_grid_over_sizes_is_a_ladder(tmp_path, axis):
    grid = {"router": ["dense", "switch"], **axis}
    experiment = write_experiment(tmp_path, "grid", grid=grid, baseline=None)
    for number, width in enumerate(WIDTHS):
        cells = tuple(cell for cell in experiment.cells if cell.config.model.d_model == width)
        part = type(experiment)(**{**vars(experiment), "cells": cells})
        write_size(tmp_path / "results", part, 13.0 + number, {"switch": 0.7})
    ladder = read_ladder([experiment], tmp_path / "results")
    assert (ladder.baseline, ladder.arms) == ("dense", ["switch"])
    assert [size.name for size in ladder.sizes] == [f"grid (d_model={width})" for width in WIDTHS]
    estimate = build_ladder_report(ladder).values["arms"]["switch"]
    assert estimate["compute"]["interval"][0] < 0.7 < estimate["compute"]["interval"][1]


def test_runs_in_common_are_refused(ladder, tmp_path):
    with pytest.raises(UsageError, match=r"have the run .* in common"):
        name_uniquely([ladder[0], ladder[0]])
    (tmp_path / "other").mkdir()
    other = write_experiment(tmp_path / "other", "S0", "model.d_model=24")
    assert [*name_uniquely([ladder[0], other])] == [ladder[0].file, other.file]


def test_one_task_and_one_baseline(ladder, tmp_path):
    other = write_experiment(tmp_path, "other", "model.d_model=48", "baseline=switch")
    with pytest.raises(UsageError, match="different baselines"):
        read_ladder([ladder[0], other], tmp_path / "results")
    vision = write_experiment(tmp_path, "vision", base={"task": {"name": "clustered"}})
    with pytest.raises(UsageError, match="got the tasks language, clustered"):
        read_ladder([ladder[0], vision], tmp_path / "results")
    with pytest.raises(UsageError, match="no run of the baseline dense is done"):
        read_ladder(ladder, tmp_path / "empty")
