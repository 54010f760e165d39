"""Cells over several processes on this machine: they are one run, and the first cause of a failure is named."""

import json
import re
import signal
import time
from pathlib import Path

import pytest
from support.command_line import CommandLine, WarmCommandLine, send, wait_until
from support.results_folder import Results, deterministic_points, journal
from support.start_methods import EXPERT_2, SIGNALS, TIMEOUT_S, wait_for_first_steps, workers_by_rank, write_faulty

from moebench.tracking.address import default_uri
from moebench.tracking.quiet import silence_mlflow

pytestmark = pytest.mark.timeout(400)
RUN = ("run", "./tiny.yaml", "--tracker", "none", "--plugin", "faulty.py", "--json", *EXPERT_2)


def assert_arms_equal_the_faultless_one(results: Results, arms: tuple[str, ...]) -> None:
    """Check that the arms, which are one algorithm, have equal results after being interrupted and resumed."""
    expected = results.folder("none 0", 0)
    for arm in arms:
        folder = results.folder(arm, 0)
        assert results.result(arm, 0)["metrics"] == results.result("none 0", 0)["metrics"]
        assert model_points(folder) == model_points(expected)
        assert (folder / "load.jsonl").read_text() == (expected / "load.jsonl").read_text()


def model_points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the points of a run without times, those of transfers included."""
    return [(s, {k: v for k, v in m.items() if not k.startswith("parallel/")}) for s, m in deterministic_points(folder)]


@pytest.mark.parametrize("faults", [("raise 1",), pytest.param(("raise 1", "kill 1"), marks=pytest.mark.slow)])
def test_one_process_that_fails_is_named_and_the_next_call_repairs(
    cli: CommandLine, warm: WarmCommandLine, faults: tuple[str, ...]
) -> None:
    write_faulty(cli, "none 0", *faults)
    started = time.monotonic()
    ended = warm(cli, *RUN, timeout=TIMEOUT_S)
    assert ended.code == 1, ended.err
    assert time.monotonic() - started < 120
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    errors = {cell["id"]: cell["error"] for cell in ended.json["failed"]}
    failure = errors[results.folder("raise 1", 0).name]
    assert re.fullmatch(r"rank 1: ValueError: the router failed in two lines \(.*faulty\.py:\d+\)", failure)
    if "kill 1" in faults:
        assert errors[results.folder("kill 1", 0).name] == "rank 1 was killed by SIGKILL (out of memory?)"
    assert "Traceback" not in ended.err
    for arm in faults:
        assert results.result(arm, 0)["error"] == errors[results.folder(arm, 0).name]
        assert results.result(arm, 0)["step"] == 7
    assert "in two lines" in (results.folder("raise 1", 0) / "log.rank1.txt").read_text()
    (cli.folder / "repaired").touch()
    again = warm(cli, *RUN, timeout=TIMEOUT_S)
    assert (again.code, len(again.json["trained"])) == (0, len(faults)), again.err
    assert_arms_equal_the_faultless_one(results, faults)


@pytest.mark.slow
def test_exits_kills_nans_and_errors_are_named(cli: CommandLine, warm: WarmCommandLine) -> None:
    arms = ("exit 1", "kill 0", "nan 1", "raise 0")
    write_faulty(cli, "none 0", *arms)
    ended = warm(cli, *RUN, timeout=TIMEOUT_S)
    assert ended.code == 1, ended.err
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    errors = {arm: results.result(arm, 0)["error"] for arm in arms}
    assert errors["exit 1"] == "rank 1 ended with exit code 7"
    assert errors["kill 0"] == "rank 0 was killed by SIGKILL (out of memory?)"
    assert errors["nan 1"].startswith("loss is nan at step 8; no update was made")  # once, although both ranks raise it
    assert re.fullmatch(r"rank 0: ValueError: the router failed in two lines \(.*faulty\.py:\d+\)", errors["raise 0"])
    faults = [results.result(arm, 0)["fault"] for arm in arms]
    assert faults == ["outside", "outside", "diverged", "own"]
    (cli.folder / "repaired").touch()
    again = warm(cli, *RUN, timeout=TIMEOUT_S)
    assert (again.code, len(again.json["trained"])) == (0, 4), again.err
    assert_arms_equal_the_faultless_one(results, arms)


@pytest.mark.slow
def test_a_process_that_hangs_ends_the_cell_in_bounded_time(cli: CommandLine, warm: WarmCommandLine) -> None:
    arms = ("stop 1", "stop 0", "sleep 1")
    write_faulty(cli, "none 0", *arms)
    ended = warm(cli, *RUN, "parallel.timeout_s=10", timeout=2 * TIMEOUT_S)
    assert ended.code == 1, ended.err
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    for arm in arms:
        result = results.result(arm, 0)
        # A process that stops right after a step has not reported it yet.
        assert re.fullmatch(rf"rank {arm[-1]} hung: no progress for 1\d s after step [3-7]", result["error"])
        assert result["throughput"]["total_s"] < 60
    (cli.folder / "repaired").touch()
    again = warm(cli, *RUN, timeout=TIMEOUT_S)
    assert (again.code, len(again.json["trained"])) == (0, 3), again.err
    assert_arms_equal_the_faultless_one(results, arms)


@pytest.mark.slow
def test_a_run_over_two_processes_is_one_run_for_the_tracker(cli: CommandLine) -> None:
    cli.write(grid={"router": ["switch"]}, seeds=[0], baseline="switch")
    ended = cli("run", "./tiny.yaml", *EXPERT_2, timeout=TIMEOUT_S)
    assert ended.code == 0, ended.err
    (folder,) = Results(cli.folder / "results").folders()
    assert [p["step"] for p in journal(folder) if "loss/task" in p["metrics"]] == [*range(1, 13)]
    with silence_mlflow():
        from mlflow import MlflowClient

        client = MlflowClient(default_uri(cli.folder / "results"))
    experiment = client.get_experiment_by_name("tiny")
    runs = {run.data.tags["mlflow.moebench.cell"]: run for run in client.search_runs([experiment.experiment_id])}
    assert set(runs) == {"experiment", folder.name}
    assert runs[folder.name].info.status == "FINISHED"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_on_all_processes_and_the_cell_resumes_bit_for_bit(
    cli: CommandLine, warm: WarmCommandLine, number: signal.Signals
) -> None:
    train = {"steps": 60, "checkpoint_every": 25, "eval_every": 20}
    cli.write(grid={"router": ["switch"]}, seeds=[0], baseline="switch", train=train)
    process = cli.start_training(*EXPERT_2)
    folder = wait_for_first_steps(cli, step=5)
    send(process, number, group=True)
    ended = cli.wait(process, timeout=90)
    assert ended.code == SIGNALS[number], ended.err
    cli.assert_no_process_is_left()
    saved = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    assert saved == journal(folder)[-1]["step"]
    assert saved < 60
    assert not (folder / "result.json").exists()
    for name in ("results", "reference"):
        again = warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", name, *EXPERT_2, timeout=TIMEOUT_S)
        assert again.code == 0, again.err
    reference = Results(cli.folder / "reference").folder("switch", 0)
    assert (
        json.loads((folder / "result.json").read_text())["metrics"]
        == json.loads((reference / "result.json").read_text())["metrics"]
    )
    assert model_points(folder) == model_points(reference)


@pytest.mark.slow
def test_kill_of_the_runner_leaves_no_process_even_if_one_is_stopped(cli: CommandLine) -> None:
    write_faulty(cli, "stop 1")
    process = cli.start_training("--plugin", "faulty.py", *EXPERT_2)
    wait_until((cli.folder / "pid_stop").exists, "rank 1 has not stopped itself", TIMEOUT_S)
    assert set(workers_by_rank(cli)) == {0, 1}
    send(process, signal.SIGKILL)
    process.communicate(timeout=20)
    cli.assert_no_process_is_left()


def test_several_nodes_need_torchrun_or_slurm(cli: CommandLine, warm: WarmCommandLine) -> None:
    run = ("run", "./tiny.yaml", "--tracker", "none")
    several = warm(cli, *run, "parallel.expert=2", "parallel.nodes=2")
    assert (several.code, several.err.count("\n")) == (2, 1)
    assert several.err.startswith("error: parallel.nodes=2: ")
    assert "torchrun or SLURM" in several.err
    assert not (cli.folder / "results").exists()
