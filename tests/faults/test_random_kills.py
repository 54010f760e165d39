"""Fifty SIGKILLs at random times: nothing twice in journals and tracker, and the result of an uninterrupted run."""

import random
import signal
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.command_line import CommandLine
from support.results_folder import Results, deterministic_points, journal

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]
NUM_KILLS = 50
TARGETS = ("runner", "worker", "fork server", "tracker")
STEPS = 600
ARMS = [
    {"label": "one process", "router": "switch"},
    {"label": "two processes", "router": "switch", "parallel.expert": 2},
]


def find_target(cli: CommandLine, runner: Any, target: str) -> psutil.Process | None:
    """Return the process to kill; None if there is none of this kind now."""
    if target == "runner":
        return psutil.Process(runner.pid)
    commands = {"fork server": "forkserver", "tracker": "moebench.tracking"}
    try:
        if target == "worker":
            return next(iter(cli.workers()), None)
        processes = [p for p in cli.processes() if p.ppid() == runner.pid]
        return next((p for p in processes if commands[target] in " ".join(p.cmdline())), None)
    except psutil.Error:
        return None


def model_points(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """Return the points of a run without the times of transfers between processes."""
    return [(s, {k: v for k, v in m.items() if not k.startswith("parallel/")}) for s, m in deterministic_points(folder)]


def test_fifty_kills_leave_no_trace(cli: CommandLine) -> None:
    train = {"steps": STEPS, "checkpoint_every": 10, "eval_every": 30}
    cli.write(grid={"arm": ARMS}, seeds=[0], baseline="one process", train=train)
    reference = cli("run", "./tiny.yaml", "--results", "reference", "--tracker", "none", timeout=300)
    assert reference.code == 0, reference.err
    rng = random.Random(20)
    num_kills = num_folders = 0
    while num_kills < NUM_KILLS:
        num_folders += 1
        run = ("run", "./tiny.yaml", "--jobs", "2", "--results", f"results{num_folders}")
        results = Results(cli.folder / f"results{num_folders}")
        while num_kills < NUM_KILLS and [*results.statuses().values()] != ["done"] * len(ARMS):
            num_kills += kill_at_random_times(cli, cli.start(*run), rng, NUM_KILLS - num_kills)
        ended = cli(*run, timeout=300)
        assert ended.code == 0, ended.err
        assert_equal_to_reference(results, Results(cli.folder / "reference"))
        assert_nothing_is_twice_in_the_tracker(results.path / "mlflow.db")
    print(f"{num_kills} kills, {num_folders} results folders")


def kill_at_random_times(cli: CommandLine, runner: Any, rng: random.Random, limit: int) -> int:
    """Kill processes of a run until it has ended, at the latest the runner after some seconds; return their number."""
    num_kills, deadline = 0, time.monotonic() + rng.uniform(4.0, 9.0)
    while runner.poll() is None and num_kills < limit:
        time.sleep(rng.uniform(0.3, 3.0))
        victim = find_target(cli, runner, rng.choice(TARGETS) if time.monotonic() < deadline else "runner")
        if victim is not None and victim.is_running():
            victim.send_signal(signal.SIGKILL)
            num_kills += 1
    runner.communicate(timeout=150)
    cli.assert_no_process_is_left(within_s=30)
    return num_kills


def assert_equal_to_reference(results: Results, expected: Results) -> None:
    """Check metrics, journals and loads, bit for bit."""
    for arm in ("one process", "two processes"):
        folder, twin = results.folder(arm, 0), expected.folder(arm, 0)
        assert results.result(arm, 0)["metrics"] == expected.result(arm, 0)["metrics"]
        assert [p["step"] for p in journal(folder) if "loss/task" in p["metrics"]] == [*range(1, STEPS + 1)]
        assert model_points(folder) == model_points(twin)
        for name in ("load.jsonl", "layers.jsonl"):
            assert (folder / name).read_text() == (twin / name).read_text()


def assert_nothing_is_twice_in_the_tracker(database: Path) -> None:
    """Check that every step of every run is in MLflow once."""
    connection = sqlite3.connect(database)
    rows = connection.execute(
        "select m.run_uuid, m.step, count(*) from metrics m join runs r on r.run_uuid = m.run_uuid"
        " where m.key = 'loss/task' and r.lifecycle_stage = 'active' group by m.run_uuid, m.step"
    ).fetchall()
    connection.close()
    assert [row for row in rows if row[2] != 1] == []
    steps: dict[str, list[int]] = {}
    for run_id, step, _ in rows:
        steps.setdefault(run_id, []).append(step)
    assert [sorted(each) for each in steps.values()] == [[*range(1, STEPS + 1)]] * 2
