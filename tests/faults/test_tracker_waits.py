"""Waiting for a tracker: Ctrl-C ends it at once, and many experiments share a database that is new."""

import os
import select
import signal
import socket
import sqlite3
import time
from contextlib import closing

import pytest
from support.command_line import BUSY_TIMEOUT_S, CommandLine, send

TIMEOUT_S = 400
SHORT = {"steps": 4, "checkpoint_every": 2, "eval_every": 4}


@pytest.mark.slow
def test_ctrl_c_ends_the_wait_for_a_tracker(cli: CommandLine) -> None:
    cli.write(grid={"router": ["dense"]}, seeds=[0], train=SHORT)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        process = cli.start("run", "./tiny.yaml", "--tracker", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert process.stderr is not None
        text, deadline = "", time.monotonic() + BUSY_TIMEOUT_S
        while "waiting for the tracker" not in text:
            assert time.monotonic() < deadline, text
            if select.select([process.stderr], [], [], 1)[0]:
                text += os.read(process.stderr.fileno(), 4096).decode()
        send(process, signal.SIGINT)
        ended = cli.wait(process)
    assert ended.code == 3
    assert "interrupted before everything was sent; nothing is lost: `moebench sync --tracker http" in ended.err
    cli.assert_no_process_is_left()


@pytest.mark.slow
def test_eight_experiments_start_on_one_new_database(cli: CommandLine) -> None:
    for seed in range(8):
        cli.write(f"e{seed}.yaml", grid={"router": ["dense"]}, seeds=[seed], train=SHORT)
    processes = [cli.start("run", f"./e{seed}.yaml", "--jobs", "1") for seed in range(8)]
    ended = [cli.wait(process, TIMEOUT_S) for process in processes]
    assert [result.code for result in ended] == [0] * 8, ended
    with closing(sqlite3.connect(cli.folder / "results" / "mlflow.db")) as database:
        assert database.execute("select status, count(*) from runs group by status").fetchall() == [("FINISHED", 16)]
        doubled = "select 1 from metrics group by run_uuid, key, step having count(*) > 1"
        assert database.execute(doubled).fetchall() == []
