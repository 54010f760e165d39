"""The first cause, from the exit reports of several processes."""

import pytest
import torch

from moebench.errors import UsageError
from moebench.launch.diagnosis import ExitReport, diagnose
from moebench.launch.error_report import classify_error
from moebench.runs.result import Fault
from moebench.training.module import NonFiniteError

DISCONNECTED = {
    "status": "failed",
    "error": "RuntimeError: Connection closed by peer",
    "fault": Fault.DISCONNECTED,
    "exit_code": 0,
}
TIMED_OUT = {
    "status": "failed",
    "error": "RuntimeError: Timed out waiting 20000ms",
    "fault": Fault.TIMEOUT,
    "exit_code": 0,
}
BROKEN_ROUTER = {"status": "failed", "error": "ValueError: no", "fault": Fault.PROCESS_ERROR, "exit_code": 0}
NAN_LOSS = {"status": "failed", "error": "loss is nan at step 8", "fault": Fault.DIVERGED, "exit_code": 0}
DONE = {"status": "done", "exit_code": 0, "metrics": {"loss": 1.0}}


def kill_by(number: int) -> dict[str, int]:
    return {"exit_code": -number}


def silent(seconds: float) -> dict[str, float]:
    return {"silent_s": seconds}


@pytest.mark.parametrize(
    ("reports", "error"),
    [
        ([DISCONNECTED, kill_by(9)], "rank 1 was killed by SIGKILL (out of memory?)"),
        ([DISCONNECTED, {"exit_code": 7}], "rank 1 ended with exit code 7"),
        ([kill_by(11)], "the process was killed by SIGSEGV"),
        ([DISCONNECTED, BROKEN_ROUTER], "rank 1: ValueError: no"),
        ([BROKEN_ROUTER, BROKEN_ROUTER], "ValueError: no"),
        ([kill_by(9), BROKEN_ROUTER], "rank 0 was killed by SIGKILL (out of memory?)"),
        ([NAN_LOSS, NAN_LOSS], "loss is nan at step 8"),
        ([TIMED_OUT, silent(24)], "rank 1 hung: no progress for 24 s after step 7"),
        ([silent(24), TIMED_OUT, DISCONNECTED], "rank 0 hung: no progress for 24 s after step 7"),
        # On a GPU those that waited in vain are aborted by the watchdog.
        ([kill_by(6), silent(24)], "rank 1 hung: no progress for 24 s after step 7"),
        ([kill_by(6), silent(4)], "rank 0 was killed by SIGABRT"),
        ([DISCONNECTED, kill_by(6)], "rank 1 was killed by SIGABRT"),
        ([BROKEN_ROUTER, kill_by(6)], "rank 0: ValueError: no"),
        ([TIMED_OUT, DISCONNECTED], "rank 1 was late: the others waited for 20 s (parallel.timeout_s) after step 7"),
        ([TIMED_OUT, TIMED_OUT], "the processes waited for each other for 20 s (parallel.timeout_s) after step 7"),
        (
            [TIMED_OUT, TIMED_OUT | {"step": 6}],
            "rank 1 was late: the others waited for 20 s (parallel.timeout_s) after step 6",
        ),
        ([DISCONNECTED, DISCONNECTED], "rank 0: RuntimeError: Connection closed by peer"),
        (
            [DISCONNECTED, {"is_unreachable": True, "silent_s": 6}],
            "rank 1 is unreachable: no heartbeat from its node for 6 s",
        ),
        ([silent(24), DONE], "rank 0 hung: no progress for 24 s after step 7"),
    ],
)
def test_the_first_cause_is_named(reports: list[dict], error: str) -> None:
    diagnosis = diagnose(
        [ExitReport(**{"rank": rank, "step": 7} | report) for rank, report in enumerate(reports)], timeout_s=20
    )
    assert (diagnosis.status, diagnosis.error) == ("failed", error)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_divergence_is_distinguished_from_other_errors_of_all_processes(num_processes: int) -> None:
    for fault in (Fault.DIVERGED, Fault.COMMON_ERROR):
        reports = [ExitReport(rank=rank, **NAN_LOSS | {"fault": fault}) for rank in range(num_processes)]
        assert diagnose(reports, 20).fault == fault
    reports = [ExitReport(rank=0, **NAN_LOSS), *(ExitReport(rank=1, exit_code=-9) for _ in range(num_processes - 1))]
    assert diagnose(reports, 20).fault == (Fault.DIVERGED if num_processes == 1 else Fault.EXTERNAL)


def test_rank_0_decides_for_a_completed_cell() -> None:
    reports = [ExitReport(rank=0, **DONE), ExitReport(rank=1, exit_code=-9)]
    assert diagnose(reports, 20).status == "done"
    assert diagnose(reports, 20).metrics == {"loss": 1.0}
    busy = [ExitReport(rank=0, status="busy", error="another process"), ExitReport(rank=1)]
    assert (diagnose(busy, 20).status, diagnose(busy, 20).error) == ("busy", "another process")


def test_errors_are_classified() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29500"
    timeout = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv"
    assert classify_error(RuntimeError(gloo)) == Fault.DISCONNECTED
    assert classify_error(RuntimeError(timeout)) == Fault.TIMEOUT
    assert (
        classify_error(torch.distributed.DistNetworkError("The client socket has timed out after 300000ms"))
        == Fault.TIMEOUT
    )
    assert classify_error(RuntimeError("shapes cannot be multiplied")) == Fault.PROCESS_ERROR
    assert classify_error(TimeoutError("a file server timed out")) == Fault.PROCESS_ERROR
    assert classify_error(UsageError("a key")) == Fault.COMMON_ERROR
    assert classify_error(NonFiniteError("loss")) == Fault.DIVERGED
