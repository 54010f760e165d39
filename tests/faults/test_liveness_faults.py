"""Processes that stop or hang: the cell fails with the reason, the others continue, and Ctrl-C stays prompt."""

import re
import signal
import time

import pytest
from support.command_line import CommandLine, WarmCommandLine, send, wait_for_step
from support.interrupted_grid import CHECKPOINT_EVERY, assert_equal_to
from support.results_folder import Results, last_step

HANGING = """
import os
import time
from dataclasses import dataclass
from pathlib import Path

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Hanging(Switch):
    '''Switch, with a fault in its sixth step or its first evaluation, unless the file `repaired` exists.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "hanging"
        fault: str = "sleep"
        '''sleep, stop, slow (evaluation) or fail.'''

    def forward(self, x_TD, ctx):
        fault = self.config.fault
        if fault == "slow" and not ctx.training:
            time.sleep(1.0)
        if ctx.training and ctx.step == 5 and not Path("repaired").exists():
            if fault == "sleep":
                time.sleep(600)
            if fault == "stop":
                os.kill(os.getpid(), 19)
            if fault == "fail":
                raise ValueError("as planned")
        return super().forward(x_TD, ctx)
"""
RUN = ("run", "./tiny.yaml", "--tracker", "none", "--plugin", "hanging.py", "--json")


def write_hanging(cli: CommandLine, *faults: str, **changes: object) -> None:
    """Write a grid of a dense arm and one arm for each fault."""
    (cli.folder / "hanging.py").write_text(HANGING)
    arms = [{"name": "hanging", "fault": fault, "label": fault} for fault in faults]
    cli.write(**{"grid": {"router": [*arms, "dense"]}, "seeds": [0]} | changes)


@pytest.mark.slow
def test_a_silent_process_fails_its_cell_and_the_next_call_repairs(cli: CommandLine, warm: WarmCommandLine) -> None:
    # Evaluations of four batches, each longer than a second: no silence, because every batch counts.
    write_hanging(cli, "sleep", "stop", "slow", train={"checkpoint_every": 1})
    ended = warm(cli, *RUN, "parallel.stall_timeout_s=12", "--jobs", "1")
    assert ended.code == 1, ended.err
    cli.assert_no_process_is_left()
    results = Results(cli.folder / "results")
    assert results.statuses() == {
        ("sleep", 0): "failed",
        ("stop", 0): "failed",
        ("slow", 0): "done",
        ("dense", 0): "done",
    }
    reason = "no step and no evaluation batch was finished for 12 s after step 5 (parallel.stall_timeout_s)"
    assert results.result("sleep", 0)["error"] == reason
    # A process that stops right after a step has not reported it yet.
    halted = re.escape(f"{reason}: the process is stopped by a signal (SIGSTOP)").replace("step\\ 5", "step [0-5]")
    assert re.fullmatch(halted, results.result("stop", 0)["error"])
    (cli.folder / "repaired").touch()
    again = warm(cli, *RUN)
    assert (again.code, len(again.json["trained"])) == (0, 2), again.err
    assert len({results.result(arm, 0)["metrics"]["bits_per_byte"] for arm in ("sleep", "stop", "slow")}) == 1


@pytest.mark.slow
def test_a_stopped_fork_server_is_continued(
    cli: CommandLine, results: Results, reference: CommandLine, warm: WarmCommandLine
) -> None:
    process = cli.start_training("--json")
    wait_for_step(results, step=CHECKPOINT_EVERY)
    (server,) = [p for p in cli.processes() if p.ppid() == process.pid and "forkserver" in " ".join(p.cmdline())]
    server.suspend()
    ended = cli.wait(process)
    assert (ended.code, len(ended.json["trained"])) == (0, 4), ended.err
    cli.assert_no_process_is_left()
    assert_equal_to(reference, cli, warm)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["sleep", "stop"])
def test_ctrl_c_does_not_wait_for_a_hanging_process(cli: CommandLine, fault: str) -> None:
    write_hanging(cli, fault, train={"checkpoint_every": 2})
    process = cli.start_training("--plugin", "hanging.py")
    results = Results(cli.folder / "results")
    folder = wait_for_step(results, step=5)
    time.sleep(1)
    sent_at = time.monotonic()
    send(process, signal.SIGINT, group=True)
    ended = cli.wait(process, timeout=30)
    print(f"{time.monotonic() - sent_at:.1f} s after Ctrl-C")
    assert ended.code == 130, ended.err
    assert "did not react" in ended.err
    cli.assert_no_process_is_left()
    assert not (folder / "result.json").exists()
    assert (folder / "checkpoints" / "step_0000004.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("group", [False, True])
def test_a_hangup_and_a_warning_of_slurm_save_checkpoints(
    cli: CommandLine, results: Results, number: signal.Signals, group: bool
) -> None:
    process = cli.start_training()
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 3)
    send(process, number, group=group)
    ended = cli.wait(process, timeout=60)
    assert ended.code == 128 + number, ended.err
    cli.assert_no_process_is_left()
    saved = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    assert saved == last_step(folder)
    assert saved > CHECKPOINT_EVERY


@pytest.mark.slow
def test_a_hangup_is_ignored_under_nohup(cli: CommandLine) -> None:
    cli.write(grid={"router": ["dense"]}, seeds=[0])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = cli.start_training()
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(Results(cli.folder / "results"), step=2)
    send(process, signal.SIGHUP, group=True)
    assert cli.wait(process).code == 0


@pytest.mark.slow
def test_sigterm_in_the_foreground_saves_a_checkpoint(cli: CommandLine, results: Results) -> None:
    process = cli.start("run", "./tiny.yaml", "--foreground", "switch", "train.steps=2000")
    folder = wait_for_step(results, step=CHECKPOINT_EVERY + 3)
    send(process, signal.SIGTERM)
    ended = cli.wait(process, timeout=60)
    assert ended.code == 143, ended.err
    saved = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    assert saved == last_step(folder)
