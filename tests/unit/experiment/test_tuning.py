"""Equal tuning: the trials of each arm, and what it chooses from their results."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.command_line import ROOT
from support.tuned_results import TUNE, expand_tuned, write_done, write_failed, write_trials

from moebench.errors import UsageError
from moebench.experiment.dry_run import list_actions
from moebench.experiment.foreground import select_phase_cell
from moebench.experiment.grid import Experiment, expand
from moebench.experiment.plan import list_planned_cells
from moebench.experiment.store import open_results, record_experiment, split_unfinished
from moebench.experiment.trials import Trial
from moebench.experiment.tuning import (
    Choice,
    TuningState,
    build_tuning_experiment,
    list_tuning_cells,
    read_tuning,
    select_tuned_cells,
)
from moebench.runs.experiment_record import read_record

RATE, COEFFICIENT = "train.learning_rate", "router.losses.load_balance"


def trials_of(experiment: Experiment, arm: str) -> list[dict[str, Any]]:
    assert experiment.tuning is not None
    (tuned,) = [tuned for tuned in experiment.tuning.arms if tuned.arm == arm]
    return [dict(trial.settings) for trial in tuned.trials]


def state_of(experiment: Experiment, results: Path) -> TuningState:
    state = read_tuning(experiment, results)
    assert state is not None
    return state


def choice_of(experiment: Experiment, results: Path, arm: str) -> Choice:
    return next(choice for choice in state_of(experiment, results).choices if choice.arm == arm)


def distance(arm: str, trial: Trial, seed: int) -> float:
    """Return a metric that is best at a learning rate of 0.002 and a coefficient of 0.01."""
    return 2 + abs(trial.settings[RATE] - 0.002) + trial.settings.get(COEFFICIENT, 0.0) + (seed - 100) / 1000


def test_an_arm_tries_the_keys_that_mean_something_to_it(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    rates = [{RATE: rate} for rate in (0.001, 0.002, 0.004)]
    assert trials_of(experiment, "dense") == trials_of(experiment, "hash") == rates
    assert trials_of(experiment, "switch") == [
        {**rate, COEFFICIENT: coefficient} for rate in rates for coefficient in (0.01, 0.1)
    ]
    assert len(list_tuning_cells(experiment)) == (3 + 6 + 3) * 2
    assert {cell.seed for cell in list_tuning_cells(experiment)} == {100, 101}


def test_extra_values_make_the_budgets_equal(tmp_path: Path) -> None:
    extra = {RATE: [0.008, 0.0005, 0.016, 0.032]}
    experiment = expand_tuned(tmp_path, tune=TUNE | {"extra": extra})
    rates = [trial[RATE] for trial in trials_of(experiment, "dense")]
    assert rates == [0.001, 0.002, 0.004, 0.008, 0.0005, 0.016]  # six, as many as switch has
    assert len(trials_of(experiment, "switch")) == 6


def test_the_example_of_the_page_gives_every_arm_nine_trials(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "tuning.md").read_text(), re.DOTALL)
    (tmp_path / "page.yaml").write_text(text)
    experiment = expand(tmp_path / "page.yaml")
    assert {arm: len(trials_of(experiment, arm)) for arm in experiment.arms} == dict.fromkeys(experiment.arms, 9)


def test_shorter_tuning_runs_have_a_shorter_warmup_and_keep_no_weights(tmp_path: Path) -> None:
    overrides = ("train.steps=400", "train.warmup_steps=100", "train.keep_checkpoints=[300]")
    experiment = expand_tuned(tmp_path, *overrides, tune=TUNE | {"steps": 100})
    train = list_tuning_cells(experiment)[0].config.train
    assert (train.steps, train.warmup_steps, train.keep_checkpoints) == (100, 25, [])
    assert experiment.cells[0].config.train.steps == 400


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seeds=[100]"], "tune.seeds must be seeds that are not reported, got [100], which are in seeds"),
        (["tune.grid.train.steps=[5]"], "tune.grid.train.steps: cannot be tuned, because all arms train on the same"),
        (["tune.grid.model.d_model=[32]"], "tune.grid.model.d_model: cannot be tuned (allowed: keys of train, router"),
        (["tune.grid.router.losses.load_balanc=[1]"], "no arm has this key. Did you mean 'router.losses.load_bal"),
        (["tune.grid.train.learning_rate=[x]"], "tune.grid: train.learning_rate: 'x' was given. Allowed: a number"),
        (["tune.grid.train.learning_rate=[1e-3, 0.001]"], "the trials 'learning_rate=0.001' and"),
        (["tune.seedz=[1]"], "tune.seedz: tune has no key 'seedz'. Did you mean 'seeds'?"),
        (["tune.extra.train.beta1=[1]"], "tune.extra.train.beta1: tune.grid lacks it (allowed: train.learning_rate"),
        (["grid.train.learning_rate=[1, 2]"], "tune.grid.train.learning_rate: the grid varies it"),
        (["train.learning_rate=0.1"], "choose its values with 'tune.grid.train.learning_rate=[0.1]' instead"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        expand_tuned(tmp_path, *overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tuning_is_turned_off_by_null(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path, "tune=null", "train.learning_rate=0.1", "seeds=[100]")
    assert experiment.tuning is None
    assert select_tuned_cells(experiment, tmp_path) is experiment


def test_each_arm_chooses_by_its_validation_mean(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, distance)
    assert choice_of(experiment, tmp_path, "switch").edges == (COEFFICIENT,)  # 0.002 is in the middle of three
    settled = select_tuned_cells(experiment, tmp_path)
    assert [(cell.arm, cell.seed) for cell in settled.cells] == [(cell.arm, cell.seed) for cell in experiment.cells]
    for cell in settled.cells:
        assert cell.config.train.learning_rate == cell.varies[RATE] == 0.002
        assert cell.config.router.losses.get("load_balance", 0.01) == 0.01
    chosen = choice_of(experiment, tmp_path, "switch").chosen
    assert chosen is not None
    assert chosen.mean == pytest.approx(2.0105)  # 2 + 0.01, plus 0 and 0.001 for the two seeds
    assert select_tuned_cells(settled, tmp_path).cells == settled.cells


def test_a_trial_that_diverged_is_the_worst(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(
        tmp_path,
        experiment,
        lambda arm, trial, seed: None if trial.settings[RATE] == 0.002 and seed == 101 else distance(arm, trial, seed),
    )
    choice = choice_of(experiment, tmp_path, "dense")
    assert choice.chosen is not None
    assert choice.chosen.trial.settings == {RATE: 0.001}
    assert [result.num_diverged for result in choice.results] == [0, 1, 0]
    # It counts as done: another run would diverge again. One that was killed is run again.
    tuning = build_tuning_experiment(experiment)
    assert split_unfinished(tmp_path, tuning) == ([], [])
    write_failed(tmp_path, tuning.cells[0], fault="outside")
    assert split_unfinished(tmp_path, tuning) == ([tuning.cells[0]], [])


def test_an_arm_whose_trials_all_failed_is_failed_and_the_others_go_on(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, lambda *trial: None if trial[0] == "hash" else distance(*trial))
    choice = choice_of(experiment, tmp_path, "hash")
    assert choice.chosen is None
    assert choice.failure == (
        "all 3 trials of its tuning failed, first learning_rate=0.001: seed 100: loss is nan at step 4"
    )
    assert select_tuned_cells(experiment, tmp_path).arms == ["dense", "switch"]


def test_of_equal_trials_the_first_is_chosen(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, lambda arm, trial, seed: 2.0)
    choice = choice_of(experiment, tmp_path, "switch")
    assert choice.chosen is choice.results[0]
    assert len(choice.ties) == 5


def test_an_arm_chooses_when_its_last_run_has_ended(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, distance)
    assert experiment.tuning is not None
    last = experiment.tuning.arms[1].trials[-1].cells[-1]
    (tmp_path / "runs" / last.id / "result.json").unlink()
    assert select_tuned_cells(experiment, tmp_path).arms == ["dense", "hash"]
    (waiting,) = state_of(experiment, tmp_path).unfinished
    assert (waiting.arm, waiting.describe_progress()) == ("switch", "11 of 12 tuning runs have ended")
    planned = [(cell.arm, is_settled) for cell, is_settled in list_planned_cells(experiment, tmp_path)[24:]]
    assert planned[:3] == [("dense", True), ("switch", False), ("hash", True)]
    actions = [(row["id"], row["state"]) for row in list_actions(experiment, tmp_path) if row["arm"] == "switch"]
    assert actions == [(None, "after tuning")] * 3
    with pytest.raises(UsageError, match="'switch' has not chosen its settings yet; allowed: tuning runs, as 'dense: "):
        select_phase_cell(experiment, "switch", tmp_path)
    phase, cell = select_phase_cell(experiment, f"{last.arm}/101", tmp_path)
    assert (phase.name, cell) == ("tuned-tuning", last)


def test_the_record_has_what_was_tried_and_chosen(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, distance)
    open_results(tmp_path)
    settled = select_tuned_cells(experiment, tmp_path)
    record_experiment(tmp_path, settled)
    record = read_record(tmp_path / "experiments" / "tuned.json")
    assert [cell["id"] for cell in record["cells"]] == [cell.id for cell in settled.cells]
    dense = record["tuning"]["arms"]["dense"]
    assert (dense["chosen"], dense["validation"]) == ({RATE: 0.002}, pytest.approx(2.0005))
    assert [trial["settings"][RATE] for trial in dense["trials"]] == [0.001, 0.002, 0.004]
    assert dense["trials"][0]["seeds"] == {"100": pytest.approx(2.001), "101": pytest.approx(2.002)}
    record_experiment(tmp_path, build_tuning_experiment(experiment))
    assert read_record(tmp_path / "experiments" / "tuned-tuning.json")["tuning_of"] == "tuned"


def test_a_higher_metric_can_be_the_better_one(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, distance)
    lower = choice_of(experiment, tmp_path, "dense")
    higher = Choice(tuning=lower.tuning, results=lower.results, lower_is_better=False)
    assert higher.ranking[0].trial.settings == {RATE: 0.004}


def test_a_run_without_a_finite_validation_metric_has_diverged(tmp_path: Path) -> None:
    experiment = expand_tuned(tmp_path)
    write_trials(tmp_path, experiment, distance)
    assert experiment.tuning is not None
    write_done(tmp_path, experiment.tuning.arms[0].trials[1].cells[0], float("nan"))
    choice = choice_of(experiment, tmp_path, "dense")
    assert choice.results[1].problems == ("seed 100: its validation bits_per_byte is nan",)
    assert choice.results[1].num_diverged == 1
