"""`moebench run --foreground`: one cell in the process of the command, for a debugger."""

import json
import re
import signal
from pathlib import Path

import pytest
from filelock import FileLock
from support.command_line import CommandLine, WarmCommandLine, wait_for_step, wait_until
from support.results_folder import Results, deterministic_points, drop_measured, last_step
from support.terminal import run_in_terminal

from moebench.runs.trivial_baselines import BELOW_TRIVIAL, RECORD_KEY

PLUGIN = """
import time
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Faulty(Switch):
    '''Switch, with a fault in its eighth step.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "faulty"
        fault: str = "breakpoint"

    def forward(self, x_TD, ctx):
        if ctx.training and ctx.step == 7:
            if self.config.fault == "breakpoint":
                breakpoint()
            if self.config.fault == "sleep":
                time.sleep(600)
            if self.config.fault == "usage":
                raise UsageError("router.fault: refused late")
            if self.config.fault == "error":
                raise ValueError("the router failed")
            if self.config.fault == "exit":
                raise SystemExit(3)
        return super().forward(x_TD, ctx)
"""
FAULTY = ("run", "./tiny.yaml", "--plugin", "faulty.py", "grid.router=[faulty]", "baseline=faulty", "--foreground")


@pytest.fixture
def results(cli: CommandLine) -> Results:
    (cli.folder / "faulty.py").write_text(PLUGIN)
    return Results(cli.folder / "results")


def test_a_cell_in_the_foreground_has_the_results_of_a_worker(
    cli: CommandLine, finished: CommandLine, results: Results, warm: WarmCommandLine
) -> None:
    ended = warm(cli, "run", "./tiny.yaml", "--foreground", "switch/1", draws_figures=True)
    assert (ended.code, ended.out) == (0, ""), ended.err
    assert ended.err.startswith("start    switch · seed 1")
    assert "\ndone     switch · seed 1" in ended.err
    assert ended.err.endswith("\nnote: computing the trivial baselines of the data, once\n")
    assert ended.err.count("\n") == 3, ended.err
    record, complete = (
        json.loads((folder / "results" / "experiments" / "tiny.json").read_text())
        for folder in (cli.folder, finished.folder)
    )
    assert record[RECORD_KEY] == complete[RECORD_KEY]
    (folder,) = results.folders()
    reference = Results(finished.folder / "results").path / "runs" / folder.name
    result, expected = (json.loads((path / "result.json").read_text()) for path in (folder, reference))
    assert result["throughput"].keys() == expected["throughput"].keys()
    assert drop_measured(result) == drop_measured(expected)
    assert deterministic_points(folder) == deterministic_points(reference)
    files = {path.name for path in reference.iterdir()} - {"log.txt"}
    assert {path.name for path in folder.iterdir()} == files
    assert not (results.path / "mlflow.db").exists()


def test_a_breakpoint_reads_standard_input(cli: CommandLine, results: Results, warm: WarmCommandLine) -> None:
    ended = warm(cli, *FAULTY, "faulty", stdin="p 40 + 2\nc\n")
    assert ended.code == 0, ended.err
    assert ended.out.count("(Pdb) ") == 2
    assert "42" in ended.out
    assert results.result("faulty", 0)["status"] == "done"


def test_leaving_the_debugger_keeps_the_cell_resumable(
    cli: CommandLine, results: Results, warm: WarmCommandLine
) -> None:
    ended = warm(cli, *FAULTY, "faulty/1", stdin="q\n")
    assert ended.code == 130, ended.err
    assert "Traceback" not in ended.err
    plan = warm(cli, "plan", *FAULTY[1:-1], "--json").json["cells"]
    assert [cell["state"] for cell in plan] == ["new", "resumable"]


def test_a_breakpoint_on_a_terminal_prompts(cli: CommandLine, results: Results, warm: WarmCommandLine) -> None:
    code, screen = run_in_terminal(warm, cli, [*FAULTY, "faulty"], keys=b"p 40 + 2\nc\n")
    assert code == 0, screen
    assert "42" in screen
    assert "done     faulty · seed 0" in screen


@pytest.mark.parametrize(
    ("fault", "last_line", "error"),
    [
        ("error", "ValueError: the router failed", "ValueError: the router failed"),
        ("usage", "RuntimeError: faulty · seed 0 failed", "router.fault: refused late"),
        ("exit", "RuntimeError: faulty · seed 0 failed", "SystemExit: 3"),
    ],
)
def test_a_failure_shows_its_traceback_and_is_recorded(
    cli: CommandLine, results: Results, warm: WarmCommandLine, fault: str, last_line: str, error: str
) -> None:
    ended = warm(cli, *FAULTY, "faulty", f"router.fault={fault}")
    assert ended.code == 1
    assert ended.err.rstrip().endswith(last_line)
    assert "in forward\n" in ended.err
    result = results.result("faulty", 0)
    assert (result["status"], result["step"]) == ("failed", 7)
    # A plugin's own exceptions are followed by its file and line.
    assert re.fullmatch(re.escape(error) + r"( \(.*faulty\.py:\d+\))?", result["error"])


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_cell_is_resumed_by_a_worker(
    cli: CommandLine, results: Results, warm: WarmCommandLine, number: signal.Signals, code: int
) -> None:
    cli.write(grid={"router": ["switch"]}, seeds=[0], baseline="switch", train={"steps": 150, "checkpoint_every": 25})
    process = warm.start(cli, "run", "./tiny.yaml", "--foreground", "switch")
    folder = wait_for_step(results, step=30)
    process.send_signal(number)
    ended = warm.finish(timeout=30)
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err
    saved_step = max(int(file.stem.removeprefix("step_")) for file in folder.glob("checkpoints/step_*.json"))
    if number == signal.SIGINT:
        assert "stopped  switch · seed 0" in ended.err
        assert saved_step == last_step(folder) < 150
    assert not (folder / "result.json").exists()
    for other in ("results", "uninterrupted"):
        assert warm(cli, "run", "./tiny.yaml", "--tracker", "none", "--results", other).code == 0
    reference = Results(cli.folder / "uninterrupted").folder("switch", 0)
    assert deterministic_points(folder) == deterministic_points(reference)


def test_a_second_ctrl_c_ends_a_step_that_hangs(cli: CommandLine, results: Results, warm: WarmCommandLine) -> None:
    process = warm.start(cli, *FAULTY, "faulty", "router.fault=sleep")
    folder = wait_for_step(results, step=7)
    process.send_signal(signal.SIGINT)
    wait_until(lambda: "(again: stop now" in (warm.scratch / "err").read_text(), "no answer to Ctrl-C")
    process.send_signal(signal.SIGINT)
    assert warm.finish(timeout=20).code == 130
    assert not (folder / "result.json").exists()


def test_a_cell_that_is_done_or_locked_is_not_trained(
    cli: CommandLine, results: Results, warm: WarmCommandLine, finished: CommandLine
) -> None:
    before = Results(finished.folder / "results").written_at()
    done = warm(finished, "run", "./tiny.yaml", "--foreground", "dense")
    note, warning = done.err.splitlines()
    assert done.code == 0
    assert "dense · seed 0 is done" in note
    assert warning == f"warning: {BELOW_TRIVIAL}"  # as `run` says of three steps
    assert Results(finished.folder / "results").written_at() == before
    cell = warm(cli, "plan", "./tiny.yaml", "--json").json["cells"][0]
    folder = results.path / "runs" / cell["id"]
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        locked = warm(cli, "run", "./tiny.yaml", "--foreground", cell["id"][:6])
    assert (locked.code, locked.err) == (1, "error: another process is training dense · seed 0\n")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("swich",), ["no cell 'swich'", "Did you mean 'switch'?", "arms: dense, switch, top_k; seeds: 0, 1"]),
        (("switch/2",), ["no cell 'switch/2'", "Did you mean 'switch"]),
        (("",), ["no cell ''"]),
        (("switch", "--json"), ["--json", "--foreground"]),
        (("switch", "--jobs", "2"), ["--jobs", "--foreground"]),
        (("switch", "--reshard"), ["--reshard", "--foreground"]),
        (("switch", "parallel.expert=2"), ["switch · seed 0 needs 2 processes", "parallel.expert=1"]),
    ],
)
def test_what_cannot_run_in_the_foreground_is_refused(
    cli: CommandLine, warm: WarmCommandLine, arguments: tuple[str, ...], parts: list[str]
) -> None:
    ended = warm(cli, "run", "./tiny.yaml", "--foreground", *arguments)
    assert (ended.code, ended.out, ended.err.count("\n")) == (2, "", 1), ended.err
    assert all(part in ended.err for part in parts), ended.err
    assert not Path(cli.folder / "results" / "runs").exists()


def test_one_of_several_processes_cannot_run_in_the_foreground(cli: CommandLine, warm: WarmCommandLine) -> None:
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NNODES": "1"}
    slurm |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1"}
    slurm |= {"SLURM_NTASKS_PER_NODE": "2"}
    ended = warm(cli, "run", "./tiny.yaml", "--foreground", "switch", environment=slurm)
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.err
    assert "torchrun or SLURM started 2" in ended.err
