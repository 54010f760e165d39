"""Run the command line in real processes, on a tiny experiment."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
from support.results_folder import Results, last_step
from support.tiny_experiment import tiny, write_text

ROOT = Path(__file__).parents[2]
MARK = "MOEBENCH_TEST_PROCESS"
WARM_MARK = uuid.uuid4().hex
"""Marks the workers of warm calls; each process of the test run makes one call at a time."""
SERVERS: set[int] = set()
"""Processes that live as long as the test run."""
TIMEOUT_S = 90
FIXTURE_TIMEOUT_S = 270.0
"""Timeout for grids that many tests read: if one is late, all of them fail."""
BUSY_TIMEOUT_S = 150.0
"""Timeout for waiting on a busy machine."""


@dataclass(frozen=True)
class CommandResult:
    """Exit code and both streams of a call that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON; fails if there is anything else."""
        return json.loads(self.out)


@dataclass
class CommandLine:
    """Calls `moebench` in a folder of its own; an environment variable marks all processes that it starts."""

    folder: Path
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def environment(self) -> dict[str, str]:
        """One thread per process, no network, no settings from outside."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("MOEBENCH_")}
        settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "160", MARK: self.mark}
        return inherited | settings | {"PYTHONPATH": str(ROOT)}

    def start(self, *arguments: str, **options: Any) -> subprocess.Popen[str]:
        """Start a call in a session of its own, as a terminal does: signals can be sent to its group."""
        defaults: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": self.environment}
        command = [sys.executable, "-m", "moebench", *arguments]
        return subprocess.Popen(command, cwd=self.folder, text=True, start_new_session=True, **defaults | options)

    def __call__(self, *arguments: str, timeout: float = TIMEOUT_S) -> CommandResult:
        """Run a command to its end."""
        return self.wait(self.start(*arguments), timeout)

    def wait(self, process: subprocess.Popen[str], timeout: float = TIMEOUT_S) -> CommandResult:
        """Wait for the end of a started call, reading both streams."""
        out, err = process.communicate(timeout=timeout)
        return CommandResult(process.returncode, out, err)

    def train(self, *arguments: str, results: str = "results", name: str = "./tiny.yaml") -> CommandResult:
        """Call `run` without a tracker."""
        return self("run", name, "--results", results, "--tracker", "none", *arguments)

    def start_training(self, *arguments: str, results: str = "results", name: str = "./tiny.yaml") -> Any:
        """Start `run` without a tracker in the background, one cell at a time unless `--jobs` is given."""
        jobs = () if "--jobs" in arguments else ("--jobs", "1")
        return self.start("run", name, "--results", results, "--tracker", "none", *jobs, *arguments)

    def write(self, name: str = "tiny.yaml", **changes: Any) -> None:
        """Write an experiment (JSON is YAML) and the text it trains on."""
        if not (self.folder / "text").exists():
            write_text(self.folder / "text")
        (self.folder / name).write_text(json.dumps(tiny(**changes), indent=1))

    def processes(self) -> list[psutil.Process]:
        """Return all living processes that calls have started, whatever their parent is now."""
        processes = []
        for process in psutil.process_iter():
            try:
                mark = process.environ().get(MARK)
                is_ours = mark in (self.mark, WARM_MARK) and process.pid not in SERVERS
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return processes

    def workers(self) -> list[psutil.Process]:
        """Return the workers of rank 0: their standard output is the log of a run."""
        processes = []
        for process in self.processes():
            try:
                if os.readlink(f"/proc/{process.pid}/fd/1").endswith("/log.txt"):
                    processes.append(process)
            except OSError:
                continue
        return processes

    def assert_no_process_is_left(self, within_s: float = 10.0) -> None:
        """Fail unless all processes end by themselves."""
        wait_until(lambda: not self.processes(), f"processes are left: {self.processes()}", within_s)

    def kill_leftovers(self) -> None:
        """Kill the processes that a failed test has left."""
        for process in self.processes():
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue


SERVER = Path(__file__).with_name("warm_server.py").read_text(encoding="utf-8")


class WarmCommandLine:
    """Runs each call in a process forked from one that has done the imports: ten times faster.

    Its calls share the server from which they fork their workers, too. Training draws no figures of runs and
    experiments, unless `draws_figures` is set: for all calls here (`make test-all`), or for one of them.
    """

    def __init__(self, scratch: Path, *, draws_figures: bool = False) -> None:
        self.scratch = scratch
        self.draws_figures = draws_figures
        self.server: subprocess.Popen[str] | None = None
        self.has_unread_answer = False

    def __call__(
        self,
        cli: CommandLine,
        *arguments: str,
        timeout: float = TIMEOUT_S,
        stdin: str = "",
        environment: Mapping[str, str] = MappingProxyType({}),
        draws_figures: bool = False,
    ) -> CommandResult:
        """Run a command in the folder of a command line, with `stdin` as its standard input."""
        out, err, given = self.scratch / "out", self.scratch / "err", self.scratch / "in"
        given.write_text(stdin)
        streams = {"in": str(given), "out": str(out), "err": str(err)}
        self.send(cli, ("moebench", *arguments), streams, environment, draws_figures=draws_figures)
        return CommandResult(self.read_code(arguments, timeout), out.read_text(), err.read_text())

    def run_script(self, cli: CommandLine, file: Path, *arguments: str) -> CommandResult:
        """Run a Python program in the folder of a command line."""
        streams = {name: str(self.scratch / name) for name in ("out", "err")}
        self.send(cli, (str(file), *arguments), {"in": os.devnull, **streams})
        return self.finish(timeout=200)

    def send(
        self,
        cli: CommandLine,
        arguments: Sequence[str],
        streams: Mapping[str, str],
        environment: Mapping[str, str] = MappingProxyType({}),
        *,
        draws_figures: bool = False,
    ) -> None:
        """Begin a command or a program, whose streams are files (`in`, `out`, `err`) or a `terminal`."""
        if self.has_unread_answer:  # of a command in the background, whose test has failed
            self.close()
        server = self.server = self.server or self._start()
        assert server.stdin is not None
        self.has_unread_answer = True
        call: dict[str, Any] = {"folder": str(cli.folder), "arguments": arguments, **streams}
        call |= {"environment": {MARK: cli.mark, **environment}, "draws_figures": draws_figures or self.draws_figures}
        print(json.dumps(call), file=server.stdin, flush=True)

    def start(self, cli: CommandLine, *arguments: str) -> psutil.Process:
        """Begin a command in the background and return its process; `finish` returns its result."""
        streams = {name: str(self.scratch / name) for name in ("out", "err")}
        self.send(cli, ("moebench", *arguments), {"in": os.devnull, **streams})
        assert self.server is not None
        server = psutil.Process(self.server.pid)
        started: list[psutil.Process] = []

        def has_started() -> bool:
            started[:] = [child for child in server.children() if child.pid not in SERVERS]
            return bool(started)

        wait_until(has_started, f"{arguments} did not start")
        return started[0]

    def finish(self, timeout: float = TIMEOUT_S) -> CommandResult:
        """Wait for the end of the command in the background."""
        code = self.read_code(("the command in the background",), timeout)
        return CommandResult(code, (self.scratch / "out").read_text(), (self.scratch / "err").read_text())

    def has_answer(self) -> bool:
        """Return whether the command that was begun has ended."""
        assert self.server is not None
        return bool(select.select([self.server.stdout], [], [], 0)[0])

    def read_code(self, arguments: Sequence[str], timeout: float) -> int:
        """Wait for the end of the command that was begun, and return its exit code."""
        assert self.server is not None
        assert self.server.stdout is not None
        if not select.select([self.server.stdout], [], [], timeout)[0]:
            self.close()  # a later call must not read the answer to this one
            raise AssertionError(f"no answer to {arguments} within {timeout:.0f} s")
        self.has_unread_answer = False
        return int(self.server.stdout.readline())

    def _start(self) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=CommandLine(self.scratch, WARM_MARK).environment,
        )
        assert server.stdout is not None
        SERVERS.update(json.loads(server.stdout.readline()))
        return server

    def train(
        self,
        cli: CommandLine,
        *arguments: str,
        results: str = "results",
        name: str = "./tiny.yaml",
        **options: Any,
    ) -> CommandResult:
        """Call `run` without a tracker."""
        return self(cli, "run", name, "--results", results, "--tracker", "none", *arguments, **options)

    def close(self) -> None:
        """End the server, and with it the one that forks workers."""
        if self.server is not None:
            self.server.kill()
            self.server.communicate()
            self.server = None
            self.has_unread_answer = False


def wait_until(condition: Callable[[], bool], failure: str, within_s: float = BUSY_TIMEOUT_S) -> None:
    """Poll until the condition holds; fail with the message `failure` after `within_s`."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"after {within_s:.0f} s: {failure}"
        time.sleep(0.02)


def wait_for_step(results: Results, step: int, num_done: int = 0) -> Path:
    """Wait until `num_done` cells are done and another has reached the step; return its folder."""
    folders: list[Path] = []

    def has_reached() -> bool:
        done = sum(status == "done" for status in results.statuses().values())
        folders[:] = [f for f in results.folders() if not (f / "result.json").exists() and last_step(f) >= step]
        return done >= num_done and bool(folders)

    wait_until(has_reached, f"no cell has reached step {step}")
    return folders[0]


def send(process: subprocess.Popen[str], number: signal.Signals, *, group: bool = False) -> None:
    """Send a signal to a call, or to its whole group as a terminal's Ctrl-C does."""
    (os.killpg if group else os.kill)(process.pid, number)
