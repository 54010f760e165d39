"""Start a run over several processes, by torchrun or as SLURM does, and a router that fails on one of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.command_line import CommandLine, wait_until
from support.results_folder import Results, last_step

EXPERT_2 = ("parallel.expert=2",)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
TIMEOUT_S = 200.0
"""Timeout of one call; starting takes 10 s on an idle machine."""
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
PROCESSES: list[Any] = []
"""Processes that `kill_all` ends."""

FAULTY = """
import os
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from moebench.routing.router import ROUTERS, Causality, Facts
from moebench.routing.routers.switch import Switch


@ROUTERS.register(Facts(family="token choice", equation="-", paper="-",
        causality=Causality(causal=True, reason="-", batch_dependent=False)))
class Faulty(Switch):
    '''Switch, with a fault in its eighth step on one rank, unless the file `repaired` exists.'''

    @dataclass(frozen=True, kw_only=True)
    class Config(Switch.Config):
        '''Options.'''

        name: str = "faulty"
        fault: str = "none"
        at: int = 1

    def forward(self, x_TD, ctx):
        routing = super().forward(x_TD, ctx)
        fault = self.config.fault
        is_faulty = dist.is_initialized() and dist.get_rank() == self.config.at
        if fault == "none" or not is_faulty or not ctx.training or ctx.step != 7 or Path("repaired").exists():
            return routing
        Path(f"pid_{fault}").write_text(str(os.getpid()))
        if fault == "raise":
            raise ValueError("the router failed\\nin two lines")
        if fault == "exit":
            os._exit(7)
        if fault == "sleep":
            time.sleep(600)
        if fault == "nan":
            return replace(routing, weight_N=routing.weight_N * float("nan"))
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])
        return routing
"""


def write_faulty(cli: CommandLine, *arms: str, **changes: Any) -> None:
    """Write an experiment with one fault per arm: `kill 1` is SIGKILL on rank 1, `none 0` is no fault."""
    entries = [{"name": "faulty", "fault": a.split()[0], "at": int(a.split()[1]), "label": a} for a in arms]
    (cli.folder / "faulty.py").write_text(FAULTY)
    cli.write(**{"grid": {"router": entries}, "seeds": [0], "baseline": arms[0]} | changes)


def torchrun(cli: CommandLine, *arguments: str, options: tuple[str, ...] = (), **popen: Any) -> Any:
    """Start `moebench run` under torchrun, by default with two processes, in a session of its own."""
    launch_options = options or ("--standalone", "--nproc-per-node", "2")
    command = [*TORCHRUN, *launch_options, "-m", "moebench", "run", "./tiny.yaml", "--tracker", "none", *arguments]
    return _start(cli, command, {}, **popen)


def slurm(cli: CommandLine, *arguments: str, size: int = 2) -> list[Any]:
    """Start `moebench run` with the environment that srun sets; return the process of each rank."""
    command = [sys.executable, "-m", "moebench", "run", "./tiny.yaml", "--tracker", "none", *arguments]
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(size),
        "SLURM_NTASKS_PER_NODE": str(size),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(size)]
    return [_start(cli, command, job | rank) for rank in ranks]


def _start(cli: CommandLine, command: list[str], environment: dict[str, str], **popen: Any) -> Any:
    defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(
        command, cwd=cli.folder, env=cli.environment | environment, start_new_session=True, **defaults | popen
    )
    PROCESSES.append(process)
    return process


def kill_all() -> None:
    """Kill the processes that a failed test has left, with their process groups."""
    while PROCESSES:
        process = PROCESSES.pop()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.stdout is not None and not process.stdout.closed:
            process.communicate(timeout=20)


def wait_for_first_steps(cli: CommandLine, step: int = 3) -> Path:
    """Wait until a run has reached a step; return its folder."""
    results = Results(cli.folder / "results")
    wait_until(lambda: any(last_step(f) >= step for f in results.folders()), f"not at step {step}", TIMEOUT_S)
    return next(folder for folder in results.folders() if last_step(folder) >= step)


def free_port() -> int:
    """Return a port that is not in use."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])


def workers_by_rank(cli: CommandLine) -> dict[int, Any]:
    """Return the processes of the running cell by rank."""
    workers = {}
    for process in cli.processes():
        try:
            log = os.readlink(f"/proc/{process.pid}/fd/1").rsplit("/", 1)[-1]
        except OSError:
            continue
        if log == "log.txt" or log.startswith("log.rank"):
            workers[0 if log == "log.txt" else int(log.removeprefix("log.rank").removesuffix(".txt"))] = process
    return workers


def moebench_lines(text: str) -> list[str]:
    """Return the lines that moebench printed, without those of torchrun."""
    starts = ("start ", "step ", "done ", "failed", "stopp", "busy", "error", "note", "next", "interrupted")
    return [line for line in text.splitlines() if line.startswith(starts) or " cells done" in line]
