"""Broken trackers: the run is not affected, and one line reports the tracker."""

import json
import math
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
from support.run_folders import write_result

from moebench.errors import UsageError
from moebench.runs.journal import Journal, read_journal
from moebench.tracking.address import default_uri, redact_uri
from moebench.tracking.mlflow_store import TrackerError
from moebench.tracking.replay import replay
from moebench.tracking.tracker import Tracker
from moebench.tracking.ui import serve

CELL = "0123456789ab"


def build(results: Path, steps: int = 20, cell: str = CELL) -> Path:
    folder = results / "runs" / cell
    folder.mkdir(parents=True)
    content = {"id": cell, "arm": "switch", "seed": 0, "config": {}, "experiment": "quickstart"}
    content |= {"data": {"name": "shakespeare", "digest": "9f"}, "varies": {"router.name": "switch"}}
    (folder / "cell.json").write_text(json.dumps(content))
    with Journal(folder / "journal.jsonl") as journal:
        for step in range(1, steps + 1):
            journal.append(step, {"loss/task": math.exp(-step)})
    result = {"status": "done", "error": None, "step": steps, "metrics": {}, "cost": {}, "throughput": {}}
    write_result(folder, **result)
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def metric_steps(database: Path) -> list[int]:
    connection = sqlite3.connect(database)
    rows = connection.execute("select step from metrics where key = 'loss/task' order by step").fetchall()
    connection.close()
    return [row[0] for row in rows]


def wait_until(condition: object, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_unreachable_server_degrades_and_loses_nothing(tmp_path: Path) -> None:
    folder = build(tmp_path)
    before = (folder / "journal.jsonl").read_bytes()
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    tracker = Tracker(tmp_path, uri, interval_s=0.1)
    start_s = time.monotonic()
    tracker.start()
    wait_until(tracker.poll, 20)
    status = tracker.stop(10)
    assert time.monotonic() - start_s < 20
    assert not status.ok
    assert status.reason is not None
    assert "\n" not in status.reason
    assert redact_uri(uri) in status.reason
    assert "moebench sync" in status.reason
    assert "secret" not in status.reason + (tmp_path / "tracking.log").read_text()
    assert (folder / "journal.jsonl").read_bytes() == before
    assert len(read_journal(folder / "journal.jsonl")[0]) == 20
    assert replay(tmp_path, default_uri(tmp_path)).values == 20
    assert metric_steps(tmp_path / "mlflow.db") == [*range(1, 21)]


def test_server_that_never_responds_is_bounded_in_time(tmp_path: Path) -> None:
    build(tmp_path)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracker = Tracker(tmp_path, f"http://127.0.0.1:{silent.getsockname()[1]}", interval_s=0.1)
        tracker.start()
        time.sleep(3)
        start_s = time.monotonic()
        status = tracker.stop(1)
        assert time.monotonic() - start_s < 4
    assert "not everything was sent within 1 s of the end of training; nothing is lost: `moebench sync" in str(
        status.reason
    )


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"not a database" * 100, id="text", marks=pytest.mark.slow),
        pytest.param(b"SQLite format 3\0" + b"\xff" * 5000, id="broken pages"),
    ],
)
def test_damaged_database_is_reported_and_never_modified(tmp_path: Path, content: bytes) -> None:
    build(tmp_path)
    database = tmp_path / "mlflow.db"
    database.write_bytes(content)
    tracker = Tracker(tmp_path, default_uri(tmp_path), interval_s=0.1)
    tracker.start()
    status = tracker.stop(20)
    assert not status.ok
    assert str(database) in str(status.reason)
    with pytest.raises(TrackerError, match=r"mlflow\.db"):
        replay(tmp_path, default_uri(tmp_path))
    with pytest.raises(UsageError, match=r"mlflow\.db .*moebench sync"):
        serve(tmp_path)
    assert database.read_bytes() == content


def test_missing_folder_is_reported(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(TrackerError, match=r"nowhere/mlflow\.db cannot be created"):
        replay(tmp_path, f"sqlite:///{tmp_path}/nowhere/mlflow.db")
    assert not (tmp_path / "nowhere").exists()


def test_unknown_kind_of_tracker_is_a_one_line_error(tmp_path: Path) -> None:
    build(tmp_path)
    with pytest.raises(TrackerError, match=r"^tracker ftp://nobody cannot be used \([^\n]*$"):
        replay(tmp_path, "ftp://nobody")


CONCURRENT_REPLAYS = """
import os, sys
from pathlib import Path
from moebench.tracking.quiet import silence_mlflow
from moebench.tracking.replay import replay
with silence_mlflow():
    from mlflow import MlflowClient
uri, *folders = sys.argv[1:]
children = []
for folder in folders:
    children.append(os.fork())
    if not children[-1]:
        os.write(1, f"{replay(Path(folder), uri).values}\\n".encode())
        os._exit(0)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def replay_concurrently(uri: str, *folders: Path) -> list[str]:
    """Replay each folder in a process of its own, all forked at once after the imports; return their output."""
    command = [sys.executable, "-c", CONCURRENT_REPLAYS, uri, *map(str, folders)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    *outputs, exit_codes = process.stdout.splitlines()
    assert exit_codes == str([0] * len(folders)), process.stderr
    return outputs


@pytest.mark.slow
def test_four_processes_create_one_database_at_once(tmp_path: Path) -> None:
    for number in range(4):
        build(tmp_path / str(number), cell=f"{number:012x}")
    assert replay_concurrently(default_uri(tmp_path), *(tmp_path / str(number) for number in range(4))) == ["20"] * 4
    assert metric_steps(tmp_path / "mlflow.db") == sorted([*range(1, 21)] * 4)


@pytest.mark.slow
def test_two_processes_that_send_the_same_runs_duplicate_nothing(tmp_path: Path) -> None:
    build(tmp_path, steps=800)
    replay_concurrently(default_uri(tmp_path), tmp_path, tmp_path)
    assert metric_steps(tmp_path / "mlflow.db") == [*range(1, 801)]


@pytest.mark.slow
def test_replay_killed_at_any_time_duplicates_nothing(tmp_path: Path) -> None:
    build(tmp_path, steps=5000)
    program = "import sys; from pathlib import Path; from moebench.tracking.replay import replay\n"
    program += "print('go', flush=True); replay(Path(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", program, str(tmp_path), default_uri(tmp_path)]
    # During the imports, the migrations of the new database or the batches, depending on the machine.
    for delay_s in (1.6, 2.0, 2.4, 2.8):
        sender = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert sender.stdout
        sender.stdout.readline()
        time.sleep(delay_s)
        sender.kill()
        sender.communicate()
    replay(tmp_path, default_uri(tmp_path))
    assert metric_steps(tmp_path / "mlflow.db") == [*range(1, 5001)]


def test_tracker_exits_when_its_runner_dies(tmp_path: Path) -> None:
    build(tmp_path)
    program = (
        "import sys, time; from pathlib import Path; from moebench.tracking.tracker import Tracker\n"
        "tracker = Tracker(Path(sys.argv[1]), sys.argv[2], interval_s=0.1)\n"
        "tracker.start(); print(tracker.pid, flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path), default_uri(tmp_path)]
    runner = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert runner.stdout
    pid = int(runner.stdout.readline())
    wait_until((tmp_path / "runs" / CELL / "tracking.json").exists)
    runner.send_signal(signal.SIGKILL)
    runner.communicate()
    wait_until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 15)


def test_killed_tracker_is_reported(tmp_path: Path) -> None:
    build(tmp_path)
    tracker = Tracker(tmp_path, default_uri(tmp_path), interval_s=60)
    tracker.start()
    assert tracker.pid
    os.kill(tracker.pid, signal.SIGKILL)
    wait_until(tracker.poll)
    status = tracker.stop(1)
    assert not status.ok
    assert "ended early" in str(status.reason)


def start_ui(results: Path, port: int) -> "subprocess.Popen[str]":
    program = (
        "import sys; from pathlib import Path; from moebench.tracking.ui import serve\n"
        "on_ready = lambda url: print(url, flush=True)\n"
        "sys.exit(serve(Path(sys.argv[1]), port=int(sys.argv[2]), on_ready=on_ready))"
    )
    command = [sys.executable, "-c", program, str(results), str(port)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_ui_is_local_and_leaves_no_process_behind(tmp_path: Path, number: int, code: int) -> None:
    build(tmp_path)
    replay(tmp_path, default_uri(tmp_path))
    port = free_port()
    ui = start_ui(tmp_path, port)
    assert ui.stdout
    url = ui.stdout.readline().strip()
    assert url == f"http://127.0.0.1:{port}", (tmp_path / "ui.log").read_text()
    with urllib.request.urlopen(f"{url}/health") as response:
        assert response.status == 200
    foreign_request = urllib.request.Request(f"{url}/api/2.0/mlflow/experiments/get?experiment_id=0")
    foreign_request.add_header("Host", "evil.example")
    with pytest.raises(urllib.error.HTTPError, match="403") as refusal:
        urllib.request.urlopen(foreign_request)
    refusal.value.close()
    with pytest.raises(UsageError, match=rf"--port {port}: Address already in use; free is \d+"):
        serve(tmp_path, port=port)
    children = psutil.Process(ui.pid).children(recursive=True)
    assert 1 <= len(children) <= 3
    listening = {c.laddr.ip for p in children for c in p.net_connections("tcp") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    ui.send_signal(number)
    assert ui.wait(15) == code
    ui.communicate()
    wait_until(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in children), 5)


def test_ui_without_a_database_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="run an experiment first"):
        serve(tmp_path)
    with pytest.raises(UsageError, match="server with its own UI"):
        serve(tmp_path, uri="http://tracker:5000")
