"""`moebench watch` on runs that are trained, done, damaged or unknown."""

import io
import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import typer
from filelock import FileLock
from rich.console import Console
from support.run_folders import write_cell, write_result

from moebench.cli import watch
from moebench.errors import UsageError
from moebench.runs.folder import RunFolder
from moebench.runs.layer_series import LayerValues
from moebench.runs.recorder import RunRecorder

COUNTS = {"tokens": 8, "dropped": 2, "rerouted": 0, "unserved": 1, "experts_per_token": 1.0, "flops_per_token": 1.0}
LAYER = LayerValues(load=(6, 2), **COUNTS)


def record(folder: RunFolder, step: int) -> None:
    with RunRecorder(folder) as recorder:
        recorder.append(step, {"loss/task": 1.0, "train/tokens_per_s": 10.0})
        recorder.record_layers(step, {"3": LAYER})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(watch, "INTERVAL_S", 0.01)
    path = tmp_path / "runs" / "3fa9c1d2e07b"
    path.mkdir(parents=True)
    write_cell(path, config={"train": {"steps": 3}})
    record(RunFolder(path), 1)
    return RunFolder(path)


def train_in_thread(folder: RunFolder, started: threading.Event) -> threading.Thread:
    def train() -> None:
        with FileLock(folder.lock, thread_local=False):
            started.wait(10)
            for step in (2, 3):
                record(folder, step)
            write_result(folder.path, step=3)

    thread = threading.Thread(target=train)
    thread.start()
    return thread


def test_once_prints_the_present_state(
    folder: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    watch.watch("3fa9", folder.path.parents[1], once=True, json=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "switch, seed 0 (3fa9c1d2e07b)  not running, step 1/3"
    assert lines[-1].split() == ["3", "█", "0.5", "▁", "0", "█", "25.0%"]


def test_ascii_where_the_encoding_has_no_blocks(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    watch.watch("3fa9", folder.path.parents[1], once=True, json=False)
    output.flush()
    text = output.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "\n3      _" in text.replace("#", "_")


def test_json_has_every_value(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    watch.watch("3fa9", folder.path.parents[1], once=False, json=True)
    values = json.loads(capsys.readouterr().out)
    assert values["layers"]["3"]["MaxVio"] == [0.5]
    assert (values["steps"], values["state"], values["collapsed"]) == ({"3": [1]}, "not running, step 1/3", {})


def test_a_pipe_gets_lines_until_the_run_is_done(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    started = threading.Event()
    thread = train_in_thread(folder, started)
    started.set()
    watch.watch("3fa9", folder.path.parents[1], once=False, json=False)
    thread.join()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 1/3  loss 1  MaxVio 0.5  dead 0  dropped 25.0%") or lines[0].startswith("step ")
    assert lines[-2].startswith("step 3/3")
    assert lines[-1] == "done, step 3/3"


def test_a_terminal_gets_a_view_that_stays(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, height=24, color_system=None, legacy_windows=False)
    monkeypatch.setattr("moebench.cli.output.make_console", lambda **_: console)
    started, printed = threading.Event(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", printed)
    thread = train_in_thread(folder, started)
    started.set()
    watch.watch("3fa9", folder.path.parents[1], once=False, json=False)
    thread.join()
    assert "layer" in screen.getvalue()
    assert "done, step 3/3" in printed.getvalue()


@pytest.mark.parametrize(("run", "message"), [("zz", "run: unknown 'zz'|run"), ("", "run")])
def test_an_unknown_run_is_an_error(folder: RunFolder, run: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        watch.watch(run, folder.path.parents[1], once=True, json=False)


def test_ctrl_c_ends_the_view_alone(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(seconds: float) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("moebench.cli.watch.time.sleep", interrupt)
    with pytest.raises(typer.Exit) as ended:
        watch.watch("3fa9", folder.path.parents[1], once=False, json=False)
    assert ended.value.exit_code == 130
