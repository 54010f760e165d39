"""Run cells over the programs that torchrun or SLURM has started: rank 0 coordinates, the others participate.

Rank 0 is the runner, as without a cluster. Each participant waits for an assignment, which names a cell, runs its rank
of that cell in its own process (so that a crash does not end the participant) and reports how it ended.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from typing_extensions import override

from moebench.errors import UsageError
from moebench.interrupts import handle_signals
from moebench.launch.cluster_environment import ClusterEnvironment
from moebench.launch.devices import require_devices
from moebench.launch.diagnosis import ExitReport
from moebench.launch.fork_server import start_fork_server
from moebench.launch.launcher import Launcher
from moebench.launch.local_worker import LocalWorker, Worker
from moebench.launch.rendezvous import (
    HEARTBEAT_TIMEOUT_S,
    STARTUP_TIMEOUT_S,
    HeartbeatMonitor,
    Rendezvous,
    RendezvousError,
)
from moebench.parallel.mesh import check_world_size
from moebench.parallel.process_info import SINGLE_PROCESS
from moebench.printable import print_error
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

POLL_INTERVAL_S = 0.1
UNREACHABLE_S = 3.0
"""After a failure, a program without a heartbeat for this long counts as unreachable."""
SHUTDOWN_TIMEOUT_S = 5.0
"""How long rank 0 waits for the participants to acknowledge the exit code."""


class RemoteWorker(Worker):
    """A process of a cell that a participant runs."""

    def __init__(self, rendezvous: Rendezvous, assignment: int, monitor: HeartbeatMonitor) -> None:
        self.rank = monitor.rank
        self.has_ended = self.is_saving = False
        self.key = f"{assignment}/{self.rank}"
        self.rendezvous = rendezvous
        self.monitor = monitor
        self.last_message_at = time.monotonic()
        self.state: dict[str, Any] = {}
        """The newest message of the participant."""

    @property
    @override
    def waitables(self) -> list[Any]:
        return []  # the store can only be polled

    @override
    def poll(self) -> dict[str, Any] | None:
        state = self.rendezvous.get(f"state/{self.key}")
        if state is not None and state != self.state:
            self.state, self.last_message_at = state, time.monotonic()
        self.has_ended = bool(self.state.get("has_ended")) or self.monitor.silent_s() > HEARTBEAT_TIMEOUT_S
        return None

    @override
    def request_stop(self) -> None:
        self.rendezvous.put(f"stop/{self.key}", {})

    @override
    def kill(self) -> None:
        if not self.has_ended:
            with contextlib.suppress(RendezvousError):
                self.rendezvous.put(f"kill/{self.key}", {})

    @override
    def exit_report(self) -> ExitReport:
        fields = {key: value for key, value in self.state.items() if key != "has_ended"}
        silent_s = self.monitor.silent_s()
        is_unreachable = silent_s > UNREACHABLE_S and not self.state.get("has_ended")
        silent_s = silent_s if is_unreachable else time.monotonic() - self.last_message_at
        return ExitReport(rank=self.rank, **fields, is_unreachable=is_unreachable, silent_s=silent_s)

    @override
    def describe_halt(self) -> str:
        return ""


class ClusterLauncher(Launcher):
    """Starts rank 0 of a cell in this program and has the participants start the other ranks."""

    max_jobs = 1
    message_delay_s = 2.0

    def __init__(self, environment: ClusterEnvironment, rendezvous: Rendezvous) -> None:
        self.process_info = environment.process_info
        self.rendezvous = rendezvous
        self.monitors = [HeartbeatMonitor(rendezvous, rank) for rank in range(1, self.process_info.world_size)]
        self.assignments = count()
        self.exit_code = 1
        """Exit code of all programs, set before `shut_down`."""

    @override
    def check(self, cells: Sequence[Cell]) -> None:
        for cell in cells:
            check_world_size(cell.config.parallel, self.process_info)
            require_devices(cell.config.train, self.process_info.local_world_size)

    def wait_for_participants(self) -> None:
        """Block until every participant has sent a heartbeat; raise UsageError if one does not."""
        deadline = time.monotonic() + STARTUP_TIMEOUT_S
        for monitor in self.monitors:
            while monitor.silent_s() >= 0 and not monitor.has_started:
                if time.monotonic() > deadline:
                    raise UsageError(
                        f"rank {monitor.rank} of {self.process_info.world_size} has not started within"
                        f" {STARTUP_TIMEOUT_S:.0f} s (under SLURM every process is started by srun)"
                    )
                time.sleep(POLL_INTERVAL_S)

    @override
    def start(self, cell: Cell, results: Path) -> list[Worker]:
        folder = RunFolder.of(results, cell.id).path
        if self.process_info.world_size == 1:
            return [LocalWorker(folder, results, SINGLE_PROCESS)]
        number = next(self.assignments)
        process_info = replace(self.process_info, namespace=f"{self.process_info.namespace}/cell/{number}")
        assignment = {
            "folder": str(folder.absolute()),
            "results": str(results.absolute()),
            "namespace": process_info.namespace,
        }
        self.rendezvous.put(f"assignment/{number}", assignment)
        remote = [RemoteWorker(self.rendezvous, number, monitor) for monitor in self.monitors]
        return [LocalWorker(folder, results, process_info), *remote]

    @override
    def release(self, cell: Cell) -> None:
        pass  # each program keeps its GPU

    @override
    def stop_signal(self) -> int | None:
        request = self.rendezvous.get("stop_request")
        return int(request["signal"]) if request else None

    def shut_down(self) -> None:
        """Send the exit code to the participants and wait until they have received it."""
        with contextlib.suppress(RendezvousError):
            self.rendezvous.put(f"assignment/{next(self.assignments)}", {"exit_code": self.exit_code})
            deadline = time.monotonic() + SHUTDOWN_TIMEOUT_S
            for monitor in self.monitors:
                while time.monotonic() < deadline and not self.rendezvous.get(f"acknowledged/{monitor.rank}"):
                    time.sleep(POLL_INTERVAL_S)


@contextlib.contextmanager
def coordinate(environment: ClusterEnvironment) -> Iterator[ClusterLauncher]:
    """Yield the launcher of rank 0; at the end, also after an error, all participants are shut down."""
    rendezvous = Rendezvous(environment)
    launcher = ClusterLauncher(environment, rendezvous)
    try:
        launcher.wait_for_participants()
        yield launcher
    except UsageError:
        launcher.exit_code = 2
        raise
    finally:
        launcher.shut_down()
        rendezvous.close()


def participate(environment: ClusterEnvironment) -> int:
    """Run the assignments of rank 0 until it shuts down, and return its exit code.

    Prints nothing unless rank 0 is lost.
    """
    try:
        rendezvous = Rendezvous(environment)
        try:
            return _Participant(environment, rendezvous).run()
        finally:
            rendezvous.close()
    except RendezvousError as error:
        print_error(str(error))
        return 1


class _Participant:
    def __init__(self, environment: ClusterEnvironment, rendezvous: Rendezvous) -> None:
        self.process_info = environment.process_info
        self.rendezvous = rendezvous
        self.coordinator = HeartbeatMonitor(rendezvous, 0)
        self.signals: list[int] = []
        self.has_requested_stop = False

    def run(self) -> int:
        with handle_signals(self.signals.append):
            start_fork_server()
            for number in count():
                while not (assignment := self.rendezvous.get(f"assignment/{number}")):
                    self._check_coordinator()
                    time.sleep(POLL_INTERVAL_S)
                if "exit_code" in assignment:
                    self.rendezvous.put(
                        f"acknowledged/{self.process_info.rank}", {"exit_code": assignment["exit_code"]}
                    )
                    return int(assignment["exit_code"])
                self._run_assignment(assignment, f"{number}/{self.process_info.rank}")
        raise AssertionError("the loop ends by returning")

    def _run_assignment(self, assignment: dict[str, Any], key: str) -> None:
        """Run this rank's process of a cell, and report its state to rank 0."""
        process_info = replace(self.process_info, namespace=assignment["namespace"])
        worker = LocalWorker(Path(assignment["folder"]), Path(assignment["results"]), process_info)
        reported_state, is_stopping = None, False
        try:
            while not worker.has_ended:
                wait(worker.waitables, 2 * POLL_INTERVAL_S)
                worker.poll()
                if (state := _worker_state(worker)) != reported_state:
                    reported_state = state
                    self.rendezvous.put(f"state/{key}", state)
                if not is_stopping and self.rendezvous.get(f"stop/{key}") is not None:
                    is_stopping = True
                    worker.request_stop()
                if self.rendezvous.get(f"kill/{key}") is not None:
                    return
                self._check_coordinator()
        finally:
            worker.kill()

    def _check_coordinator(self) -> None:
        """Raise RendezvousError if rank 0 is lost; send it a stop request if this program has received a signal."""
        if self.signals and not self.has_requested_stop:
            self.has_requested_stop = True
            self.rendezvous.put("stop_request", {"signal": self.signals[0]})
        silent_s = self.coordinator.silent_s()
        if not self.coordinator.has_started:
            timeout_s = STARTUP_TIMEOUT_S
        else:
            timeout_s = UNREACHABLE_S if self.signals else HEARTBEAT_TIMEOUT_S
        if silent_s > timeout_s:
            raise RendezvousError(f"rank {self.process_info.rank}: no heartbeat from rank 0 for {silent_s:.0f} s")


def _worker_state(worker: LocalWorker) -> dict[str, Any]:
    report = worker.exit_report()
    return {
        "step": report.step,
        "status": report.status,
        "error": report.error,
        "fault": report.fault,
        "exit_code": report.exit_code,
        "has_ended": worker.has_ended,
    }
