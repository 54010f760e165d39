"""`moebench run` of an experiment with tuning: both phases in one command, interrupted, resumed and shared."""

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

TUNE = {"grid": {"train.learning_rate": [1e-2, 1e12]}, "seeds": [7]}


@pytest.fixture
def tuned(cli: CommandLine) -> CommandLine:
    cli.write(tune=TUNE, grid={"router": ["dense", "switch"]}, seeds=[0])
    return cli


def test_each_arm_is_trained_with_what_it_has_chosen(tuned: CommandLine, warm: WarmCommandLine) -> None:
    run = warm.train(tuned)
    assert run.code == 0, run.err  # a trial that diverges is an outcome, not a failure
    assert "phase 1 of 2: tuning, 4 runs: 2 trials of each arm, 1 seed each" in run.err
    assert "phase 2 of 2: 2 runs with the settings that each arm has chosen" in run.err
    assert "validation bits per byte" in run.err
    results = Results(tuned.folder / "results")
    assert sorted(results.statuses().values()) == ["done"] * 4 + ["failed"] * 2
    for arm in ("dense", "switch"):
        assert results.result(arm, 0)["config"]["train"]["learning_rate"] == 0.01
    before = results.written_at()
    again = warm.train(tuned, "--json")
    assert (again.code, again.json["tuning"]["trained"], again.json["trained"]) == (0, [], [])
    assert results.written_at() == before  # the diverged trials are not run again either
    compared = warm(tuned, "compare", "./tiny.yaml", "--json").json
    chosen = {arm: choice["chosen"] for arm, choice in compared["tuning"]["arms"].items()}
    assert chosen == {arm: {"train.learning_rate": 0.01} for arm in ("dense", "switch")}
    assert set(compared["arms"]) == {"dense", "switch"}
    removed = warm(tuned, "rm", "tiny", "--yes")
    assert "kept: its tuning runs (moebench rm tiny-tuning)" in removed.out
    assert len(results.folders()) == 4
    assert warm(tuned, "verify").code == 0


def test_arms_that_would_be_refused_are_refused_before_the_tuning_runs(
    tuned: CommandLine, warm: WarmCommandLine
) -> None:
    tuned.write(tune=TUNE | {"steps": 1}, grid={"router": ["dense"]}, seeds=[0], train={"max_epochs": 0.01})
    run = warm.train(tuned)
    assert run.code == 2
    assert "phase 1" not in run.err
    assert "epochs of the training split (allowed: 0.01; more data, fewer steps" in run.err
    assert not Results(tuned.folder / "results").folders()


def test_an_experiment_of_which_no_arm_can_choose_ends_without_a_traceback(
    tuned: CommandLine, warm: WarmCommandLine
) -> None:
    tuned.write(tune=TUNE | {"grid": {"train.learning_rate": [1e12]}}, grid={"router": ["dense", "switch"]}, seeds=[0])
    run = warm.train(tuned)
    assert (run.code, "Traceback" in run.err) == (1, False), run.err
    for arm in ("dense", "switch"):
        assert f"failed: {arm}: all 1 trials of its tuning failed" in run.err + run.out
    assert "phase 2" not in run.err


def test_a_plan_says_which_arms_have_fewer_trials(tuned: CommandLine, warm: WarmCommandLine) -> None:
    tune = {"grid": {"train.learning_rate": [1e-2, 2e-2], "router.losses.load_balance": [0.01, 0.1]}, "seeds": [7]}
    tuned.write(tune=tune, grid={"router": ["dense", "switch"]}, seeds=[0])
    plan = " ".join(warm(tuned, "plan", "./tiny.yaml").out.split())
    assert "note: unequal budgets: 2 to 4 trials; fewer for dense (tune.extra gives them more)" in plan


@pytest.mark.slow
def test_two_runners_share_the_phases(tuned: CommandLine) -> None:
    runners = [tuned.start_training("--jobs", "1") for _ in range(2)]
    ended = [tuned.wait(runner) for runner in runners]
    results = Results(tuned.folder / "results")
    # Of the last runs, which the runners share, one may report that the other trains it.
    assert {run.code for run in ended} <= {0, 1}, [run.err for run in ended]
    assert tuned.train().code == 0
    assert sorted(results.statuses().values()) == ["done"] * 4 + ["failed"] * 2
    attempts = [file.read_text().count("\n") for file in results.path.glob("runs/*/attempts.jsonl")]
    assert max(attempts) <= 3
