"""The runner or a worker is killed or stopped: nothing finished is lost, what was begun goes on bit for bit."""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.command_line import (
    CommandLine,
    Results,
    WarmCommandLine,
    journal,
    last_step,
    repeatable,
    send,
    wait_for_step,
    wait_until,
    without_speed,
)

from moebench import interrupts
from moebench.launch import local_worker

STEPS, EVERY = 90, 15
ARMS, SEEDS = ["dense", "switch"], [0, 1]
TRAIN = {"steps": STEPS, "checkpoint_every": EVERY, "eval_every": 30, "batch_size": 4}
STOP_WITHIN_S = 30.0
GO_ON = ("run", "./tiny.yaml", "--tracker", "none", "--jobs", "2")


def write(cli: CommandLine, **changes: Any) -> None:
    cli.write(**{"train": TRAIN, "grid": {"router": ARMS}, "seeds": SEEDS} | changes)


@pytest.fixture(scope="session")
def whole(built_once: Callable[[str, Callable[[Path], Any]], Path]) -> CommandLine:
    """The grid trained without an interruption, and compared: what every interrupted one must equal."""
    return CommandLine(built_once("whole", train_without_interruption))


def train_without_interruption(folder: Path) -> None:
    cli = CommandLine(folder)
    write(cli)
    try:
        ended = cli.train("--jobs", "1")
        assert ended.code == 0, ended.err
        compared = cli("compare", "./tiny.yaml", "--json")
    finally:
        cli.kill_leftovers()
    assert (compared.code, compared.err) == (0, "")
    (folder / "comparison.json").write_text(compared.out)


@pytest.fixture
def results(cli: CommandLine) -> Results:
    write(cli)
    return Results(cli.folder / "results")


def assert_equal_to(whole: CommandLine, cli: CommandLine, warm: WarmCommandLine) -> None:
    """Metrics, journals, loads and the comparison are those of the uninterrupted grid; speeds are measured."""
    theirs = Results(whole.folder / "results")
    for folder in Results(cli.folder / "results").folders():
        twin = theirs.path / "runs" / folder.name
        ours, other = (json.loads((path / "result.json").read_text()) for path in (folder, twin))
        assert ours["throughput"]["tokens_per_s"] > 0, folder
        for result in (ours, other):
            del result["throughput"]
        assert ours == other
        assert [p["step"] for p in journal(folder) if "loss/task" in p["metrics"]] == [*range(1, STEPS + 1)]
        assert repeatable(folder) == repeatable(twin)
        if (twin / "load.jsonl").exists():
            assert loads(folder) == loads(twin)
    compared = warm(cli, "compare", "./tiny.yaml", "--json")
    assert (compared.code, compared.err) == (0, "")
    original = json.loads((whole.folder / "comparison.json").read_text())
    assert without_speed(compared.json) == without_speed(original)


def loads(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "load.jsonl").read_text().splitlines()]


def assert_resumed(folder: Path, first_times: dict[int, float]) -> None:
    """The points up to the checkpoint are those of before, by their times; those after it are new."""
    now = {point["step"]: point["time"] for point in journal(folder) if "loss/task" in point["metrics"]}
    kept = [step for step, time_s in first_times.items() if now.get(step) == time_s]
    assert kept, "nothing was kept: it began anew"
    assert kept == [*range(1, max(kept) + 1)]


def times(folder: Path) -> dict[int, float]:
    return {point["step"]: point["time"] for point in journal(folder) if "loss/task" in point["metrics"]}


def test_kill_of_the_runner(cli: CommandLine, results: Results, whole: CommandLine, warm: WarmCommandLine) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=EVERY + 10, num_done=1)
    send(process, signal.SIGKILL)
    process.communicate(timeout=20)
    cli.assert_no_process_is_left(within_s=10)
    before, begun = results.written_at(), times(folder)
    assert set(results.statuses().values()) == {"done"}
    assert not (folder / "result.json").exists()
    plan = {cell["id"]: cell["state"] for cell in warm(cli, "plan", "./tiny.yaml", "--json").json["cells"]}
    assert plan[folder.name] == "resumable"
    early = warm(cli, "compare", "./tiny.yaml", "--json")
    assert early.code == 0, early.err
    assert len(early.json["missing"]) == 4 - len(before)
    again = warm(cli, *GO_ON, "--json")
    assert again.code == 0, again.err
    assert len(again.json["trained"]) == 4 - len(before)
    assert before.items() <= results.written_at().items()  # what was done was not touched
    assert_resumed(folder, begun)
    assert_equal_to(whole, cli, warm)


def test_kill_of_one_worker(cli: CommandLine, results: Results, whole: CommandLine, warm: WarmCommandLine) -> None:
    process = cli.start_training("--json")
    folder = wait_for_step(results, step=EVERY + 5, num_done=1)
    (worker,) = cli.workers()
    worker.kill()
    ended = cli.wait(process)
    assert ended.code == 1, ended.err
    cli.assert_no_process_is_left()
    (failed,) = ended.json["failed"]
    assert failed["id"] == folder.name
    assert "SIGKILL" in failed["error"]
    assert Path(cli.folder / failed["log"]) == folder / "log.txt"
    assert len(ended.json["trained"]) == 3
    assert sorted(results.statuses().values()) == ["done", "done", "done", "failed"]
    comparison = warm(cli, "compare", "./tiny.yaml", "--json").json
    assert [(cell["id"], "SIGKILL" in cell["reason"]) for cell in comparison["failed"]] == [(folder.name, True)]
    again = warm(cli, *GO_ON, "--json")
    assert (again.code, again.json["trained"]) == (0, [folder.name]), again.err
    assert_equal_to(whole, cli, warm)


@pytest.mark.parametrize(
    ("number", "group", "code"),
    [
        pytest.param(signal.SIGINT, True, 130, id="ctrl-c in a terminal"),
        pytest.param(signal.SIGINT, False, 130, id="int to the runner", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, 143, id="term to the runner", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, 143, id="term to the whole group", marks=pytest.mark.slow),
    ],
)
def test_a_stop_saves_and_the_next_call_goes_on(
    cli: CommandLine,
    results: Results,
    whole: CommandLine,
    number: signal.Signals,
    group: bool,
    code: int,
    warm: WarmCommandLine,
) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=EVERY + 7)
    asked = time.monotonic()
    send(process, number, group=group)
    ended = cli.wait(process, timeout=STOP_WITHIN_S)
    assert time.monotonic() - asked < STOP_WITHIN_S
    assert ended.code == code, ended.err
    cli.assert_no_process_is_left()
    assert "Traceback" not in ended.err
    assert "interrupted; go on with: moebench run ./tiny.yaml" in ended.err
    assert "failed" not in results.statuses().values()
    assert not (folder / "result.json").exists()
    saved = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    if number == signal.SIGINT or not group:
        assert saved == last_step(folder)  # saved where it was stopped, not at the last multiple
    begun = times(folder)
    again = warm(cli, *GO_ON)
    assert again.code == 0, again.err
    assert_resumed(folder, begun)
    now = times(folder)
    assert {step: now[step] for step in range(1, saved + 1)} == {step: begun[step] for step in range(1, saved + 1)}
    assert_equal_to(whole, cli, warm)


def test_sigterm_saves_and_says_143(cli: CommandLine, results: Results, warm: WarmCommandLine) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=EVERY + 3)
    send(process, signal.SIGTERM)
    ended = cli.wait(process, timeout=STOP_WITHIN_S)
    assert ended.code == 143, ended.err
    cli.assert_no_process_is_left()
    plan = {cell["id"]: cell["state"] for cell in warm(cli, "plan", "./tiny.yaml", "--json").json["cells"]}
    assert plan[folder.name] == "resumable"


STUCK = """
import time
from dataclasses import dataclass
from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch

@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Stuck(Switch):
    '''Stops answering at its fifth step.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "stuck"

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step >= 5:
            time.sleep(600)
        return super().forward(x_TD, ctx)
"""


def test_a_second_ctrl_c_ends_at_once(cli: CommandLine, results: Results) -> None:
    (cli.folder / "stuck.py").write_text(STUCK)
    process = cli.start_training("--plugin", "stuck.py", "grid.router=[stuck]")
    folder = wait_for_step(results, step=5)
    send(process, signal.SIGINT, group=True)
    with pytest.raises(subprocess.TimeoutExpired):  # it waits for the end of the step
        process.wait(timeout=2)
    send(process, signal.SIGINT, group=True)
    ended = cli.wait(process, timeout=10)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    cli.assert_no_process_is_left()
    assert not (folder / "result.json").exists()


def test_a_ctrl_c_while_the_workers_load_leaves_nothing_behind(cli: CommandLine, results: Results) -> None:
    """In the seconds when torch is imported, by the runner or by the server that forks the workers."""
    process = cli.start_training()
    wait_until(lambda: any("forkserver" in " ".join(p.cmdline()) for p in cli.processes()), "no server of workers")
    send(process, signal.SIGINT, group=True)
    ended = cli.wait(process, timeout=STOP_WITHIN_S)
    cli.assert_no_process_is_left()
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert results.statuses() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "after_s", [pytest.param(0.3, marks=pytest.mark.slow), 1.0, pytest.param(1.6, marks=pytest.mark.slow)]
)
def test_a_stop_during_start_up_is_not_a_crash(
    cli: CommandLine, results: Results, after_s: float, number: signal.Signals
) -> None:
    process = cli.start_training()
    time.sleep(after_s)
    send(process, number, group=True)
    ended = cli.wait(process, timeout=STOP_WITHIN_S)
    cli.assert_no_process_is_left()
    # Before a handler is there SIGTERM ends the process itself: the shell then says 143 too.
    assert ended.code in {signal.SIGINT: {130, -2}, signal.SIGTERM: {143, -15}}[number], ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_server_of_processes_starts_is_heard(number: signal.Signals, monkeypatch) -> None:
    heard: list[int] = []
    monkeypatch.setattr(local_worker.forkserver, "ensure_running", lambda: os.kill(os.getpid(), number))
    with local_worker.signals_noted(heard.append):
        local_worker.start_server()
        assert heard == [number]


def test_a_signal_that_a_library_swallowed_is_remembered(monkeypatch) -> None:
    monkeypatch.setattr(interrupts, "heard", [])
    before = signal.getsignal(signal.SIGINT)
    heard: list[int] = []
    try:
        interrupts.remember()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with local_worker.signals_noted(heard.append):
            assert heard == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_two_runners_at_once_share_the_grid(
    cli: CommandLine, results: Results, whole: CommandLine, warm: WarmCommandLine
) -> None:
    """Neither trains what the other is training, and neither spoils what the other has finished."""
    first = cli.start_training("--json")
    # In another order: it comes to cells that the first has finished since the second looked.
    second = cli.start_training("--json", "grid.router=[switch,dense]")
    owners: dict[str, set[int]] = {}

    def watch() -> bool:
        for folder in results.folders():
            holders = set(training_in(cli, folder))
            assert len(holders) <= 1 or last_step(folder) == 0 or (folder / "result.json").exists()
            owners.setdefault(folder.name, set()).update(holders)
        return first.poll() is not None and second.poll() is not None

    wait_until(watch, "the two did not end", within_s=90)
    ends = [cli.wait(process) for process in (first, second)]
    assert {end.code for end in ends} <= {0, 1}, [end.err for end in ends]
    for end in ends:
        assert "Traceback" not in end.err
        for failed in end.json["failed"]:
            assert failed["error"] == "another process is training this cell"
    trained = [cell for end in ends for cell in end.json["trained"]]
    assert sorted(trained) == sorted({*trained}), "a cell was trained twice"
    assert set(results.statuses().values()) == {"done"}
    again = warm(cli, *GO_ON, "--json")
    assert again.code == 0, again.err
    assert_equal_to(whole, cli, warm)


def training_in(cli: CommandLine, folder: Path) -> list[int]:
    """Processes that have the journal of a run open."""
    found = []
    for worker in cli.workers():
        try:
            links = [os.readlink(link) for link in Path(f"/proc/{worker.pid}/fd").iterdir()]
        except OSError:
            continue
        found += [worker.pid] if str(folder / "journal.jsonl") in links else []
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "damaged",
    ["newest", pytest.param("all", marks=pytest.mark.slow), pytest.param("truncated", marks=pytest.mark.slow)],
)
def test_a_damaged_checkpoint_is_told_from_a_good_one(
    cli: CommandLine, results: Results, whole: CommandLine, damaged: str, warm: WarmCommandLine
) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=2 * EVERY + 7)
    send(process, signal.SIGINT)
    assert cli.wait(process).code == 130
    files = sorted(folder.glob("checkpoints/step_*.ckpt"))
    assert len(files) == 2
    for checkpoint in files if damaged == "all" else files[-1:]:
        file = max(checkpoint.iterdir(), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damaged != "truncated" else content[: len(content) // 2])
    begun = times(folder)
    again = warm(cli, *GO_ON)
    assert again.code == 0, again.err
    log = (folder / "log.txt").read_text()
    assert f"{files[-1].name}: " in log
    if damaged != "all":
        assert_resumed(folder, begun)
        kept = sum(times(folder)[step] == begun[step] for step in begun)
        assert kept == int(files[0].stem.removeprefix("step_"))
    assert_equal_to(whole, cli, warm)


def test_a_kill_between_the_last_checkpoint_and_the_result(
    cli: CommandLine, results: Results, whole: CommandLine, warm: WarmCommandLine
) -> None:
    """All steps are done, only the result is missing: it is made again, with a speed."""
    shutil.copytree(whole.folder / "results", results.path)
    for folder in results.folders():
        (folder / "result.json").unlink()
    assert warm(cli, *GO_ON).code == 0
    assert_equal_to(whole, cli, warm)


@pytest.mark.slow
def test_kills_at_any_moment(cli: CommandLine, results: Results, whole: CommandLine, warm: WarmCommandLine) -> None:
    """Twelve kills at moments drawn by chance, then an end: all as if nothing had been."""
    draw = random.Random(1)
    for _ in range(12):
        process = cli.start_training()
        time.sleep(draw.uniform(3.0, 5.0))
        send(process, signal.SIGKILL)
        process.communicate(timeout=20)
        cli.assert_no_process_is_left()
        for file in itertools.chain(results.path.rglob("*.json"), results.path.rglob("result.json")):
            json.loads(file.read_text())  # whole or absent
    assert warm(cli, *GO_ON).code == 0
    assert_equal_to(whole, cli, warm)
    strays = [file for file in results.path.rglob("*") if ".tmp" in file.name]
    assert not strays
