"""Starting workers while the process that they are forked from ends."""

import sys
from multiprocessing import forkserver
from pathlib import Path

import psutil
import pytest
import typer

from moebench.__main__ import _run
from moebench.launch.fork_server import end_fork_server, start_fork_server
from moebench.launch.local_worker import LocalWorker
from moebench.parallel.process_info import SINGLE_PROCESS


def test_a_fork_server_that_ends_is_a_failure_of_the_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(descriptors: object) -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr(forkserver, "connect_to_new_process", end)
    monkeypatch.setattr(forkserver._forkserver, "connect_to_new_process", end)
    with pytest.raises(OSError, match="forked from has ended"):  # what the scheduler makes a failed cell of
        LocalWorker(tmp_path, tmp_path, SINGLE_PROCESS)


def test_an_ended_fork_server_is_replaced_at_once() -> None:
    start_fork_server()
    first = forkserver._forkserver._forkserver_pid
    end_fork_server()
    start_fork_server()
    second = forkserver._forkserver._forkserver_pid
    assert second != first
    assert psutil.Process(second).is_running()


def test_the_end_of_a_pipe_is_no_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise EOFError("unexpected EOF")

    monkeypatch.setattr("moebench.cli.app", app)
    monkeypatch.setattr(sys, "argv", ["moebench"])
    with pytest.raises(EOFError):
        _run()
