"""The first cause among the ends of several processes."""

import pytest
import torch

from moebench.errors import UsageError
from moebench.launch.diagnosis import COMMON, LOST, OUTSIDE, OWN, WAITED, Ending, judge
from moebench.launch.failure import fault_of
from moebench.runs.result import Fault
from moebench.training.module import NonFiniteError

HUNG_UP = {"status": "failed", "error": "RuntimeError: Connection closed by peer", "fault": LOST, "exit_code": 0}
IN_VAIN = {"status": "failed", "error": "RuntimeError: Timed out waiting 20000ms", "fault": WAITED, "exit_code": 0}
BROKE = {"status": "failed", "error": "ValueError: no", "fault": OWN, "exit_code": 0}
NAN = {"status": "failed", "error": "loss is nan at step 8", "fault": Fault.DIVERGED, "exit_code": 0}
DONE = {"status": "done", "exit_code": 0, "metrics": {"loss": 1.0}}


def killed(number: int) -> dict[str, int]:
    return {"exit_code": -number}


def silent(seconds: float) -> dict[str, float]:
    return {"silent_s": seconds}


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        ([HUNG_UP, killed(9)], "rank 1 was killed by SIGKILL (out of memory?)"),
        ([HUNG_UP, {"exit_code": 7}], "rank 1 ended with exit code 7"),
        ([killed(11)], "the process was killed by SIGSEGV"),
        ([HUNG_UP, BROKE], "rank 1: ValueError: no"),
        ([BROKE, BROKE], "ValueError: no"),
        ([killed(9), BROKE], "rank 0 was killed by SIGKILL (out of memory?)"),
        ([NAN, NAN], "loss is nan at step 8"),
        ([IN_VAIN, silent(24)], "rank 1 hung: no progress for 24 s after step 7"),
        ([silent(24), IN_VAIN, HUNG_UP], "rank 0 hung: no progress for 24 s after step 7"),
        # On a GPU those that waited in vain are aborted by the watchdog.
        ([killed(6), silent(24)], "rank 1 hung: no progress for 24 s after step 7"),
        ([killed(6), silent(4)], "rank 0 was killed by SIGABRT"),
        ([HUNG_UP, killed(6)], "rank 1 was killed by SIGABRT"),
        ([BROKE, killed(6)], "rank 0: ValueError: no"),
        ([IN_VAIN, HUNG_UP], "rank 1 was late: the others waited for 20 s (parallel.timeout_s) after step 7"),
        ([IN_VAIN, IN_VAIN], "the processes waited for each other for 20 s (parallel.timeout_s) after step 7"),
        (
            [IN_VAIN, IN_VAIN | {"step": 6}],
            "rank 1 was late: the others waited for 20 s (parallel.timeout_s) after step 6",
        ),
        ([HUNG_UP, HUNG_UP], "rank 0: RuntimeError: Connection closed by peer"),
        ([HUNG_UP, {"is_gone": True, "silent_s": 6}], "rank 1 is unreachable: no heartbeat from its node for 6 s"),
        ([silent(24), DONE], "rank 0 hung: no progress for 24 s after step 7"),
    ],
)
def test_the_first_cause_is_named(ends: list[dict], error: str) -> None:
    verdict = judge([Ending(**{"rank": rank, "step": 7} | end) for rank, end in enumerate(ends)], timeout_s=20)
    assert (verdict.status, verdict.error) == ("failed", error)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_divergence_is_told_from_other_errors_that_all_have(num_processes: int) -> None:
    for fault in (Fault.DIVERGED, COMMON):
        ends = [Ending(rank=rank, **NAN | {"fault": fault}) for rank in range(num_processes)]
        assert judge(ends, 20).fault == fault
    ends = [Ending(rank=0, **NAN), *(Ending(rank=1, exit_code=-9) for _ in range(num_processes - 1))]
    assert judge(ends, 20).fault == (Fault.DIVERGED if num_processes == 1 else OUTSIDE)


def test_the_first_process_speaks_for_a_cell_that_is_through() -> None:
    ends = [Ending(rank=0, **DONE), Ending(rank=1, exit_code=-9)]
    assert judge(ends, 20).status == "done"
    assert judge(ends, 20).metrics == {"loss": 1.0}
    busy = [Ending(rank=0, status="busy", error="another process"), Ending(rank=1)]
    assert (judge(busy, 20).status, judge(busy, 20).error) == ("busy", "another process")


def test_whose_fault_an_error_is() -> None:
    gloo = "[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:29500"
    waited = "[../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20000ms for recv"
    assert fault_of(RuntimeError(gloo)) == LOST
    assert fault_of(RuntimeError(waited)) == WAITED
    assert fault_of(torch.distributed.DistNetworkError("The client socket has timed out after 300000ms")) == WAITED
    assert fault_of(RuntimeError("shapes cannot be multiplied")) == OWN
    assert fault_of(TimeoutError("a file server timed out")) == OWN
    assert fault_of(UsageError("a key")) == COMMON
    assert fault_of(NonFiniteError("loss")) == Fault.DIVERGED
