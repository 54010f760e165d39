"""`sync`, `verify` and `rm` against an MLflow server, as against a database: each call in this process."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from support.tracked_runs import build_experiment

from moebench import __main__ as program

pytestmark = pytest.mark.slow


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of an MLflow server with a database of its own, outside any results folder."""
    folder, port = tmp_path / "server", free_port()
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", str(folder)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "DO_NOT_TRACK": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=2):
                break
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a command in this process; return its code and both streams."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moebench", *arguments])
        code = program._run()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def execute(database: Path, *statements: str) -> list[Any]:
    with closing(sqlite3.connect(database, timeout=30)) as connection, connection:
        return [row for statement in statements for row in connection.execute(statement).fetchall()]


def test_a_server_is_checked_repaired_and_cleared_as_a_database_is(tmp_path: Path, server: str, call: Any) -> None:
    results, database = tmp_path / "results", tmp_path / "server" / "server.db"
    folders = build_experiment(results)
    options = ("--results", str(results), "--tracker", server, "--json")
    assert call("sync", *options)[0] == 0
    code, out, _ = call("verify", *options)
    assert [f for f in json.loads(out)["findings"] if f["level"] == "problem"] == [], out
    assert code == 0
    active = "select run_uuid from runs where lifecycle_stage = 'active'"
    of_cell = f"select run_uuid from tags where key = 'mlflow.moebench.cell' and value = '{folders[0].name}'"
    execute(
        database,
        f"insert into metrics select key, value, timestamp - 5, run_uuid, step, is_nan from metrics where step = 7"
        f" and run_uuid in ({of_cell})",
        f"delete from metrics where step = 3 and key = 'loss/task' and run_uuid not in ({of_cell})",
        "update tags set value = '{}' where key = 'mlflow.moebench.cursor'",
        f"update runs set status = 'RUNNING' where run_uuid in ({of_cell})",
    )
    code, out, _ = call("verify", *options)
    text = json.dumps([finding["problem"] for finding in json.loads(out)["findings"]])
    for expected in ("2 points are there twice", "3 points of the journals are missing", "1 runs are shown as running"):
        assert expected in text
    assert code == 1
    code, out, _ = call("verify", "--fix", *options)
    assert json.loads(out)["failed"] == []
    assert code == 0, out
    number = f"select count(*), count(distinct step) from metrics where key = 'loss/task' and run_uuid in ({active})"
    assert execute(database, number) == [(120, 30)]
    code, out, err = call("rm", folders[0].name, "--yes", *options)
    assert (code, json.loads(out)["tracker"]) == (0, None), err
    assert execute(database, f"{active} and run_uuid in ({of_cell})") == []
    assert call("rm", "quickstart", "--yes", *options)[0] == 0
    assert execute(database, active) == []
    assert not [*(results / "runs").iterdir()]


def test_a_server_that_cannot_be_reached_is_one_line(tmp_path: Path, call: Any) -> None:
    results, address = tmp_path / "results", f"http://u:hunter2@127.0.0.1:{free_port()}"
    folders = build_experiment(results)
    options = ("--results", str(results), "--tracker", address)
    code, out, err = call("verify", *options)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("problem")]
    assert "cannot be used" in line
    code, out, err = call("rm", folders[0].name, "--yes", *options)
    assert (code, err.count("\n")) == (3, 1)
    assert "its runs are not marked as deleted there" in err
    assert not folders[0].exists()
    code, out, err = call("sync", *options)
    assert (code, err.count("\n")) == (3, 1)
    assert f"`moebench sync --results {results}` with the same --tracker" in err
    assert "hunter2" not in line + err
