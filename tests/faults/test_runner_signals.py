"""SIGINT and SIGTERM at any time: checkpoints are saved, no process is left, and the next call resumes."""

import contextlib
import os
import signal
import time

import pytest
from support.command_line import CommandLine, WarmCommandLine, send, wait_for_step, wait_until
from support.interrupted_grid import (
    CHECKPOINT_EVERY,
    RESUME,
    STOP_TIMEOUT_S,
    assert_equal_to,
    assert_resumed,
    step_times,
)
from support.results_folder import Results, last_step

from moebench import interrupts
from moebench.launch import fork_server


@pytest.mark.parametrize(
    ("number", "group"),
    [
        pytest.param(signal.SIGINT, True, id="ctrl-c in a terminal"),
        pytest.param(signal.SIGINT, False, id="int to the runner", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, id="term to the runner", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, True, id="term to the process group", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_checkpoints_and_the_next_call_resumes(
    cli: CommandLine,
    results: Results,
    reference: CommandLine,
    number: signal.Signals,
    group: bool,
    warm: WarmCommandLine,
) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 7)
    sent_at = time.monotonic()
    send(process, number, group=group)
    ended = cli.wait(process, timeout=STOP_TIMEOUT_S)
    assert time.monotonic() - sent_at < STOP_TIMEOUT_S
    assert ended.code == 128 + number, ended.err
    cli.assert_no_process_is_left()
    assert "Traceback" not in ended.err
    assert "interrupted; continue with: moebench run ./tiny.yaml" in ended.err
    assert "failed" not in results.statuses().values()
    assert not (folder / "result.json").exists()
    saved = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    if number == signal.SIGINT or not group:
        assert saved == last_step(folder)  # saved at the step where it stopped, not at the last regular checkpoint
    first_times = step_times(folder)
    again = warm(cli, *RESUME)
    assert again.code == 0, again.err
    assert_resumed(folder, first_times)
    now = step_times(folder)
    assert {step: now[step] for step in range(1, saved + 1)} == {
        step: first_times[step] for step in range(1, saved + 1)
    }
    assert_equal_to(reference, cli, warm)


def test_sigterm_saves_a_checkpoint_and_exits_with_143(
    cli: CommandLine, results: Results, warm: WarmCommandLine
) -> None:
    process = warm.start(cli, "run", "./tiny.yaml", "--tracker", "none", "--jobs", "1")
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 3)
    process.send_signal(signal.SIGTERM)
    ended = warm.finish(timeout=STOP_TIMEOUT_S)
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
    '''Hangs in its fifth step.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "stuck"

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step >= 5:
            time.sleep(600)
        return super().forward(x_TD, ctx)
"""


def test_a_second_ctrl_c_does_not_wait_for_the_step(cli: CommandLine, results: Results, warm: WarmCommandLine) -> None:
    (cli.folder / "stuck.py").write_text(STUCK)
    options = ("--tracker", "none", "--jobs", "1", "--plugin", "stuck.py", "grid.router=[stuck]")
    process = warm.start(cli, "run", "./tiny.yaml", *options)
    folder = wait_for_step(results, step=5)
    process.send_signal(signal.SIGINT)
    time.sleep(2)
    assert not warm.has_answer()  # the runner waits for the end of the step
    process.send_signal(signal.SIGINT)
    ended = warm.finish(timeout=10)
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    cli.assert_no_process_is_left()
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_ctrl_c_while_the_workers_import_torch(cli: CommandLine, results: Results) -> None:
    """The signal arrives while the runner or the fork server imports torch."""
    process = cli.start_training()
    wait_until(lambda: any("forkserver" in " ".join(p.cmdline()) for p in cli.processes()), "no fork server")
    send(process, signal.SIGINT, group=True)
    ended = cli.wait(process, timeout=STOP_TIMEOUT_S)
    cli.assert_no_process_is_left()
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    assert results.statuses() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "after_s", [pytest.param(0.3, marks=pytest.mark.slow), 1.0, pytest.param(1.6, marks=pytest.mark.slow)]
)
def test_a_signal_during_start_up_shows_no_traceback(
    cli: CommandLine, results: Results, after_s: float, number: signal.Signals
) -> None:
    process = cli.start_training()
    time.sleep(after_s)
    send(process, number, group=True)
    ended = cli.wait(process, timeout=STOP_TIMEOUT_S)
    cli.assert_no_process_is_left()
    # Before there is a handler SIGTERM kills the process, for which a shell reports 143 too.
    assert ended.code in {signal.SIGINT: {130, -2}, signal.SIGTERM: {143, -15}}[number], ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_fork_server_starts_is_handled(number: signal.Signals, monkeypatch) -> None:
    received: list[int] = []
    monkeypatch.setattr(fork_server.forkserver, "ensure_running", lambda: os.kill(os.getpid(), number))
    with interrupts.handle_signals(received.append):
        fork_server.start_fork_server()
        deadline = time.monotonic() + 10  # another thread of the test process may get it first
        while not received and time.monotonic() < deadline:
            time.sleep(0.01)
        assert received == [number]


def test_an_interrupt_that_a_library_swallowed_is_handled(monkeypatch) -> None:
    monkeypatch.setattr(interrupts, "received", [])
    before = signal.getsignal(signal.SIGINT)
    received: list[int] = []
    try:
        interrupts.record_interrupts()
        with contextlib.suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        with interrupts.handle_signals(received.append):
            assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)
