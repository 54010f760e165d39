"""The scheduler's decisions: what a failure ends, what is tried again, how long it waits."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.scripted_workers import (
    DIVERGED,
    DONE,
    FAILED,
    SILENT,
    RecordingDisplay,
    ScriptedLauncher,
)
from support.tiny_experiment import tiny, write_text

import moebench
from moebench.experiment.grid import Experiment
from moebench.launch.activity import MIN_STOP_TIMEOUT_S, ActivityMonitor
from moebench.launch.containment import Containment
from moebench.launch.scheduler import Interrupted, Outcome, SchedulePolicy, Scheduler
from moebench.runs.attempts import read_attempts
from moebench.runs.folder import RunFolder

ARMS = ("dense", "switch", "top_k")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("grid")
    write_text(folder / "text")
    file = folder / "tiny.yaml"
    changes: Any = {
        "base": {"task": {"name": "language", "data": {"path": str(folder / "text"), "tokenizer": "bytes"}}},
        "seeds": [0],
    }
    file.write_text(json.dumps(tiny(**changes)))
    return moebench.load_experiment(file)


class Grid:
    """A scheduler over scripted workers."""

    def __init__(self, experiment: Experiment, results: Path, launcher: ScriptedLauncher, **policy: Any) -> None:
        self.experiment = experiment
        self.results = results
        self.launcher = launcher
        self.display = RecordingDisplay()
        self.containment = Containment()
        self.policy = SchedulePolicy(**policy)
        self.callbacks: dict[str, Any] = {}

    def run(self) -> dict[str, Outcome]:
        scheduler = Scheduler(self.results, "tiny", self.policy, self.display, self.launcher, self.containment)
        return {outcome.cell.arm: outcome for outcome in scheduler.run(self.experiment.cells, **self.callbacks)}

    def folder(self, arm: str) -> RunFolder:
        (cell,) = [cell for cell in self.experiment.cells if cell.arm == arm]
        return RunFolder.of(self.results, cell.id)


def statuses(outcomes: dict[str, Outcome]) -> list[str]:
    return [outcomes[arm].status for arm in ARMS if arm in outcomes]


@pytest.mark.parametrize("faulty", ["on_start", "on_progress", "on_end"])
def test_a_display_that_raises_ends_nothing(experiment: Experiment, tmp_path: Path, faulty: str) -> None:
    grid = Grid(experiment, tmp_path, ScriptedLauncher({"switch": [FAILED]}))
    grid.display = RecordingDisplay(faulty)
    assert statuses(grid.run()) == ["done", "failed", "done"]
    (problem,) = grid.containment.problems  # once, although it happens for each cell
    assert problem.startswith("display: ")


def test_callbacks_that_raise_end_nothing(experiment: Experiment, tmp_path: Path) -> None:
    def raise_error(*arguments: Any) -> None:
        raise OSError("broken")

    grid = Grid(experiment, tmp_path, ScriptedLauncher({}))
    grid.callbacks = {"on_tick": raise_error, "on_end": raise_error}
    grid.launcher.release = raise_error
    assert statuses(grid.run()) == ["done"] * 3
    assert len(grid.containment.problems) == 3


def test_a_damaged_journal_fails_its_cell_alone(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(experiment, tmp_path, ScriptedLauncher({"switch": [FAILED]}))
    grid.folder("switch").path.mkdir(parents=True)
    grid.folder("switch").journal.write_bytes(b"\xff\x00 no point\n")
    assert statuses(grid.run()) == ["done", "failed", "done"]
    result = grid.folder("switch").read_result()
    assert result is not None
    assert (result.error, result.step) == ("ValueError: no", 3)  # the step that the worker had reported
    assert "journal of switch, seed 0: UsageError" in grid.containment.problems[0]


@pytest.mark.parametrize("error", [OSError(11, "Resource temporarily unavailable"), RuntimeError("no store")])
def test_a_cell_that_cannot_be_started_fails_alone(experiment: Experiment, tmp_path: Path, error: Exception) -> None:
    reports: Any = {"switch": [error]}
    outcomes = Grid(experiment, tmp_path, ScriptedLauncher(reports)).run()
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert str(error) in str(outcomes["switch"].error)


def test_a_failed_cell_is_tried_again_and_its_attempts_are_recorded(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(experiment, tmp_path, ScriptedLauncher({"switch": [FAILED, FAILED, DONE]}), retries=2)
    outcomes = grid.run()
    assert grid.launcher.started == ["dense", "switch", "switch", "switch", "top_k"]
    assert (outcomes["switch"].status, outcomes["switch"].attempts) == ("done", 3)
    attempts = read_attempts(grid.folder("switch").attempts)
    assert [(a.status, a.error, a.step) for a in attempts] == [
        ("failed", "ValueError: no", 3),
        ("failed", "ValueError: no", 3),
        ("done", None, 3),
    ]
    assert [outcome.is_retried for outcome in grid.display.ended] == [False, True, True, False, False]


@pytest.mark.parametrize(("report", "num_starts"), [(FAILED, 3), (DIVERGED, 1)])
def test_retries_end_and_divergence_is_not_retried(
    experiment: Experiment, tmp_path: Path, report: dict[str, Any], num_starts: int
) -> None:
    grid = Grid(experiment, tmp_path, ScriptedLauncher({"switch": [report]}), retries=2)
    outcomes = grid.run()
    assert grid.launcher.started.count("switch") == num_starts
    assert outcomes["switch"].error == report["error"]
    assert outcomes["top_k"].status == "done"


def test_fail_fast_stops_the_others_with_everything_saved(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(
        experiment, tmp_path, ScriptedLauncher({"dense": [SILENT], "switch": [FAILED]}), jobs=2, stops_at_failure=True
    )
    outcomes = grid.run()
    assert {arm: outcome.status for arm, outcome in outcomes.items()} == {"dense": "stopped", "switch": "failed"}
    assert grid.launcher.started == ["dense", "switch"]
    assert "--fail-fast" in grid.display.notes[0]
    assert grid.folder("dense").read_result() is None


def with_limit(experiment: Experiment, limit_s: float) -> Experiment:
    """Return the experiment with another stall limit; the ids stay."""
    cells = [
        replace(cell, config=replace(cell.config, parallel=replace(cell.config.parallel, stall_timeout_s=limit_s)))
        for cell in experiment.cells
    ]
    return replace(experiment, cells=tuple(cells))


def test_a_silent_cell_fails_and_the_others_go_on(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(with_limit(experiment, 0.5), tmp_path, ScriptedLauncher({"switch": [SILENT]}))
    outcomes = grid.run()
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert "no step and no evaluation batch was finished for" in str(outcomes["switch"].error)
    assert "after step 3 (parallel.stall_timeout_s)" in str(outcomes["switch"].error)
    assert grid.launcher.workers[1].is_killed
    result = grid.folder("switch").read_result()
    assert result is not None
    assert result.fault == "outside"


def test_a_cell_that_ignores_the_stop_is_ended(experiment: Experiment, tmp_path: Path) -> None:
    grid = Grid(experiment, tmp_path, ScriptedLauncher({"dense": [SILENT]}, obeys=False))
    is_sent = False

    def interrupt() -> None:
        nonlocal is_sent
        if not is_sent:
            is_sent = True
            os.kill(os.getpid(), signal.SIGUSR1)

    grid.callbacks = {"on_tick": interrupt}
    with pytest.raises(Interrupted) as interrupted:
        grid.run()
    assert interrupted.value.signal_number == signal.SIGUSR1
    (outcome,) = interrupted.value.outcomes
    assert (outcome.status, grid.launcher.workers[0].is_killed) == ("stopped", True)
    assert "did not react" in str(outcome.error)


def test_time_in_which_the_runner_was_stopped_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = ActivityMonitor()
    monitor.update(100.0)
    now = 4000.0  # Ctrl-Z, and an hour later fg
    monitor.update(100.0)
    assert monitor.silent_s == 5.0
    now = 4002.0
    monitor.update(100.0)
    assert monitor.silent_s == 7.0
    monitor.update(4001.0)
    assert monitor.silent_s == 0.0


def test_the_wait_for_a_stop_follows_the_slowest_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monitor = ActivityMonitor()
    monitor.update(0.0)
    assert monitor.stop_timeout_s(is_saving=False) == MIN_STOP_TIMEOUT_S
    for second in range(1, 41):
        now = float(second)
        # The first message after 20 s, of which imports and data are the most; then a step of ten seconds.
        monitor.update(0.0 if second < 20 else 20.0 if second < 31 else 30.5)
        expected = MIN_STOP_TIMEOUT_S if second < 31 else 30.0
        assert monitor.stop_timeout_s(is_saving=False) == expected
    assert monitor.stop_timeout_s(is_saving=True) == 60.0
