"""`compare` of a tuned experiment: what each arm has chosen, edges, ties, arms without a choice."""

from pathlib import Path
from typing import Any

import pytest
from support.tuned_results import TUNE, expand_tuned, write_done, write_trials

from moebench.analysis.compare.experiment import compare_experiment
from moebench.analysis.compare.report import build_report
from moebench.analysis.compare.values import Comparison
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.experiment.trials import Trial
from moebench.experiment.tuning import select_tuned_cells

RATE, COEFFICIENT = "train.learning_rate", "router.losses.load_balance"


def quality(arm: str, trial: Trial, seed: int) -> float | None:
    if arm == "hash":
        return None
    return 2 + abs(trial.settings[RATE] - 0.002) + trial.settings.get(COEFFICIENT, 0.0)


def write_finals(results: Path, experiment: Experiment) -> None:
    for cell in select_tuned_cells(experiment, results).cells:
        write_done(results, cell, 2 + cell.seed / 100)


def table_of(comparison: Comparison, title: str) -> list[tuple[str, ...]]:
    (table,) = [table for table in build_report(comparison).tables if table.title.startswith(title)]
    return [tuple(column.header for column in table.columns), *table.rows]


def compare(experiment: Experiment, results: Path, **options: Any) -> Comparison:
    return compare_experiment(experiment, results, allow_mismatch=True, **options)


def test_the_table_shows_what_each_arm_has_chosen(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, quality)
    write_finals(tmp_path, experiment)
    comparison = compare(experiment, tmp_path)
    assert table_of(comparison, "Tuning: what each arm has chosen on the validation split, seeds 100, 101") == [
        ("arm", "trials", "failed", "learning_rate", "load_balance", "validation", "2nd best"),
        ("dense", "3", "–", "0.002", "–", "2.0000", "+0.0010"),
        ("switch", "6", "–", "0.002", "0.01*", "2.0100", "+0.0010"),
        ("hash", "3", "3", "–", "–", "all failed", "–"),
    ]
    notes = "\n".join(build_report(comparison).caveats)
    (edge,) = next(table for table in build_report(comparison).tables if table.title.startswith("Tuning")).notes
    assert edge == "* the smallest or largest value tried: a better one may lie beyond it: switch (load_balance)."
    assert edge not in notes
    assert "unequal budgets: 3 to 6 trials; fewer for dense, hash (tune.extra gives them more)." in notes
    assert "tunes on test" not in notes  # each arm has chosen on validation
    values = comparison.to_dict()["tuning"]
    assert values["arms"]["switch"]["chosen"] == {RATE: 0.002, COEFFICIENT: 0.01}
    assert values["arms"]["switch"]["edges"] == [COEFFICIENT]
    assert (values["split"], values["seeds"]) == ("validation", [100, 101])
    assert comparison.arms[0].mean == pytest.approx(3.01)  # the test split, of the seeds that are reported


def test_an_arm_that_can_choose_nothing_is_failed(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, quality)
    write_finals(tmp_path, experiment)
    comparison = compare(experiment, tmp_path)
    assert {cell.arm for cell in comparison.failed} == {"hash"}
    assert "all 3 trials of its tuning failed" in comparison.failed[0].reason
    assert comparison.describe_verdict("hash") == "3 of 3 diverged"
    assert comparison.missing == ()


def test_arms_that_have_not_chosen_are_missing(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    message = "no cell of 'tuned' has a result there yet .*; 0 of 24 tuning runs have ended"
    with pytest.raises(UsageError, match=message):
        compare(experiment, tmp_path)
    write_trials(tmp_path, experiment, quality)
    assert experiment.tuning is not None
    for trial in experiment.tuning.arms[1].trials:
        (tmp_path / "runs" / trial.cells[0].id / "result.json").unlink()
    write_finals(tmp_path, experiment)
    comparison = compare(experiment, tmp_path)
    assert {cell.arm for cell in comparison.missing} == {"switch"}
    row = table_of(comparison, "Tuning")[2]
    assert row == ("switch", "6", "–", "–", "–", "6 of 12 runs", "–")
    notes = build_report(comparison).caveats
    assert "not tuned yet, so not trained: switch (6 of 12 tuning runs have ended)." in notes


def test_equal_trials_are_named(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path, tune=TUNE | {"grid": {RATE: [0.001, 0.002]}})
    write_trials(tmp_path, experiment, lambda arm, trial, seed: 2.0)
    write_finals(tmp_path, experiment)
    comparison = compare(experiment, tmp_path)
    notes = "\n".join(build_report(comparison).caveats)
    assert "dense: 1 other trial with the same validation value; the first of the grid is taken." in notes
    assert "unequal budgets" not in notes


def test_an_experiment_without_tuning_has_no_such_table(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path, "tune=null")
    for cell in experiment.cells:
        write_done(tmp_path, cell, 2.0)
    comparison = compare(experiment, tmp_path)
    assert "tuning" not in comparison.to_dict()
    assert not any(table.title.startswith("Tuning") for table in build_report(comparison).tables)


def test_the_trivial_baselines_are_those_of_the_runs_that_were_chosen(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, lambda arm, trial, seed: 2 - trial.settings[RATE])  # not the default rate
    write_finals(tmp_path, experiment)
    # The runs name data of another text: what is looked for are their baselines, not those of cells before tuning.
    assert "data" in compare(experiment, tmp_path).trivial_problem
