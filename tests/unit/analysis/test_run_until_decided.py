"""Adding seeds to undecided arms alone: which, what is recorded, and that a repeated run decides alike.

All results are in the folder beforehand, so that nothing is trained; tests/e2e has real runs.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.comparison_runs import make_result

from moebench.analysis.compare.experiment import compare_experiment
from moebench.analysis.compare.summary import build_summary, refresh_summaries
from moebench.analysis.figures import Figures
from moebench.analysis.seed_planning.sequential import DecisionReport, run_until_decided
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.phases import run_phases
from moebench.experiment.run_setup import RunOptions, RunSetup
from moebench.launch.launcher import LocalLauncher
from moebench.runs.experiment_record import read_record, write_record
from moebench.runs.experiment_summary import read_summary, summary_path
from moebench.runs.folder import RunFolder

TINY = {
    "question": "When is it decided?",
    "base": {"task": {"name": "clustered"}, "train": {"steps": 2, "warmup_steps": 1}},
    "grid": {"router": ["dense", "switch", "top_k", "hash_position"]},
}
NOISE = (0.02, -0.03, 0.01, -0.02, 0.03, 0.0, -0.01, 0.02)
OFFSETS: Mapping[str, Callable[[int], float]] = {
    "switch": lambda seed: -0.5 + 0.001 * (-1) ** seed,  # decided with five seeds
    "top_k": lambda seed: 0.1 * (-1) ** seed,  # never decided
    # decided with eight
    "hash_position": lambda seed: -0.06 + (0.05, -0.05, 0.04, -0.04, 0.0, -0.05, -0.06, -0.07)[seed],
}


def build(folder: Path, *overrides: str) -> Experiment:
    file = folder / "tiny.yaml"
    file.write_text(json.dumps(TINY))
    return expand(file, overrides)


def store_results(results: Path, folder: Path, num_seeds: int = 8, **changes: Any) -> None:
    """Write the results of all arms for these seeds."""
    for cell in build(folder, f"seeds={[*range(num_seeds)]}").cells:
        value = 2 + NOISE[cell.seed] + (OFFSETS[cell.arm](cell.seed) if cell.arm in OFFSETS else 0)
        run, stored = RunFolder.of(results, cell.id), cell.to_dict("tiny")
        run.write_cell(stored)
        metrics = {"metrics": {"mse": value}, "validation": {"mse": value}} | changes.get(cell.arm, {})
        run.write_result(make_result(cell.arm, cell.seed, 0.0, id=cell.id, config=stored["config"], **metrics))


@pytest.fixture
def setup(tmp_path: Path) -> RunSetup:
    console = Console(file=StringIO(), width=200)
    options = RunOptions(tracker="none", jobs=1)
    return RunSetup(
        results=tmp_path / "results", options=options, launcher=LocalLauncher(), console=console, figures=Figures()
    )


def read_plan(results: Path) -> dict[str, Any]:
    record = json.loads((results / "experiments" / "tiny.json").read_text())
    [plan] = record["seed_plans"].values()
    return plan | {"cells": {(cell["arm"], cell["seed"]) for cell in record["cells"]}}


def run(folder: Path, setup: RunSetup, max_seeds: int = 8) -> DecisionReport:
    return run_until_decided(build(folder), setup, max_seeds)


def test_undecided_arms_and_the_baseline_get_the_seeds_up_to_the_maximum(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    report = run(tmp_path, setup)
    assert dict(report.added) == dict.fromkeys(("dense", "top_k", "hash_position"), (5, 6, 7))
    assert report.verdicts == {"switch": "better", "top_k": "undecided", "hash_position": "better"}
    assert (report.run.num_done, report.run.num_cells, report.run.trained) == (29, 29, [])
    plan = read_plan(setup.results)
    assert (plan["planned"], plan["maximum"], len(plan["history"]), len(plan["cells"])) == (5, 8, 1, 29)
    assert ("switch", 5) not in plan["cells"]
    assert isinstance(setup.console.file, StringIO)
    note = "note: 2 of 3 arms undecided: top_k, hash_position and dense get the seeds 5, 6, 7"
    assert note in setup.console.file.getvalue()
    json.dumps(report.to_dict())
    assert report.list_lines()[0] == "switch: better, 5 seeds"


def test_a_repeated_run_ends_with_the_same_cells_and_verdicts(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    first = run(tmp_path, setup)
    plan = read_plan(setup.results)
    second = run(tmp_path, setup)
    assert (second.added, second.verdicts) == (first.added, first.verdicts)
    assert [cell.id for cell in second.run.experiment.cells] == [cell.id for cell in first.run.experiment.cells]
    assert read_plan(setup.results) == plan


def test_compare_knows_the_added_seeds_and_the_looks(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    run(tmp_path, setup)
    comparison = compare_experiment(build(tmp_path), setup.results)
    seeds = {difference.arm: len(difference.seeds) for difference in comparison.differences}
    assert seeds == {"switch": 5, "top_k": 8, "hash_position": 8}
    levels = {difference.arm: round(difference.level, 4) for difference in comparison.differences}
    assert levels == {"switch": 0.0132, "top_k": 0.0403, "hash_position": 0.0403}
    assert sum("of two planned looks, at 5 and 8 seeds" in note for note in comparison.notes) == 2
    assert comparison.to_dict()["design"]["max_seeds"] == 8


def test_a_maximum_named_after_the_results_costs_power(tmp_path: Path, setup: RunSetup) -> None:
    fixed = replace(setup, results=tmp_path / "fixed")
    store_results(fixed.results, tmp_path)
    run_phases(build(tmp_path), fixed)  # five seeds, as planned: the full level
    report = run(tmp_path, fixed)
    comparison = compare_experiment(build(tmp_path), fixed.results)
    levels = {difference.arm: difference.level for difference in comparison.differences}
    assert levels == {"switch": 0.05, "top_k": 0.005, "hash_position": 0.005}
    assert any("seeds were added to the 5 planned ones after looking" in note for note in comparison.notes)
    assert set(report.added) == {"dense", "top_k", "hash_position"}


def test_nothing_is_added_where_all_is_decided(tmp_path: Path, setup: RunSetup) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(json.dumps(TINY | {"grid": {"router": ["dense", "switch"]}}))
    store_results(setup.results, tmp_path)
    file.write_text(json.dumps(TINY | {"grid": {"router": ["dense", "switch"]}}))
    report = run_until_decided(expand(file), setup, 8)
    assert (report.added, report.verdicts, report.run.num_cells) == ({}, {"switch": "better"}, 10)


def test_a_larger_maximum_extends_the_arms_that_are_still_undecided(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    run(tmp_path, setup, 6)
    report = run(tmp_path, setup, 8)
    assert set(report.added) == {"dense", "top_k", "hash_position"}
    assert report.added["top_k"] == (5, 6, 7)
    assert len(read_plan(setup.results)["history"]) == 2


@pytest.mark.parametrize("maximum", [5, 3, 10**6])
def test_a_maximum_that_adds_nothing_or_too_much_is_refused(tmp_path: Path, setup: RunSetup, maximum: int) -> None:
    with pytest.raises(UsageError, match=r"--max-seeds must be 6 to 5000: more than the 5 planned seeds"):
        run(tmp_path, setup, maximum)


def test_two_planned_seeds_are_refused(tmp_path: Path, setup: RunSetup) -> None:
    with pytest.raises(UsageError, match=r"seeds must be at least 3 with --until, got \[0, 1\]"):
        run_until_decided(build(tmp_path, "seeds=[0,1]"), setup, 8)


def test_a_damaged_plan_is_noted_by_compare(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    run(tmp_path, setup)
    path = setup.results / "experiments" / "tiny.json"
    record = read_record(path)
    [key] = record["seed_plans"]
    write_record(path, record | {"seed_plans": {key: {"history": "5"}}})
    comparison = compare_experiment(build(tmp_path), setup.results)
    assert any("'seed_plans' is damaged" in note for note in comparison.notes)
    assert {difference.level for difference in comparison.differences} == {0.001}


def test_the_summary_of_the_tracker_has_the_level_of_the_look(tmp_path: Path, setup: RunSetup) -> None:
    store_results(setup.results, tmp_path)
    run(tmp_path, setup, max_seeds=8)
    summary = build_summary(compare_experiment(build(tmp_path), setup.results))
    path = summary_path(setup.results, "tiny")
    path.unlink(missing_ok=True)
    refresh_summaries(setup.results)
    written = read_summary(setup.results, "tiny")
    assert written is not None
    assert any("the second of two planned looks" in sentence for sentence in written.sentences)
    assert set(written.sentences) >= set(summary.sentences[: len(summary.arms) - 1])
