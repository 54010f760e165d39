"""Find the first cause when the processes of a cell fail: one fails by itself, the others because of it."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebench.runs.result import Fault


@dataclass(frozen=True, kw_only=True)
class ExitReport:
    """How one process ended, or that it has not."""

    rank: int
    step: int = 0
    """The last step that it is known to have completed."""
    status: str | None = None
    """Reported by the process: done, stopped, skipped, busy or failed; None: it reported nothing."""
    error: str | None = None
    fault: str = ""
    """The `Fault` of the error."""
    exit_code: int | None = None
    """Minus the number of the signal that killed it; None: it has not ended by itself."""
    is_unreachable: bool = False
    """Whether its node has stopped sending heartbeats."""
    silent_s: float = 0.0
    """Seconds since its last message, or heartbeat if it is unreachable."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """How a cell ended: done, stopped, skipped, busy or failed; for a failure, the first cause and its `Fault`."""

    status: str
    error: str | None = None
    fault: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def diagnose(reports: Sequence[ExitReport], timeout_s: float) -> Diagnosis:
    """Return how a cell ended.

    `reports` are in order of rank; `timeout_s` is the timeout of collectives. Rank 0 writes the result: if it
    completed, so did the cell.
    """
    first = reports[0]
    if first.status not in (None, "failed"):
        return Diagnosis(status=str(first.status), error=first.error, metrics=first.metrics)
    for fault, error in (
        (Fault.EXTERNAL, _describe_kill(reports)),
        *_list_errors(reports),
        (Fault.EXTERNAL, _describe_hang(reports, timeout_s)),
        (Fault.EXTERNAL, _describe_kill(reports, aborted=True)),
        (Fault.TIMEOUT, _describe_timeout(reports, timeout_s)),
        *((report.fault, f"{_process_name(report, reports)}: {report.error}") for report in reports if report.error),
    ):
        if error:
            return Diagnosis(status="failed", error=error, fault=fault)
    return Diagnosis(status="failed", error="no process reported a reason", fault=Fault.EXTERNAL)


def describe_stall(reports: Sequence[ExitReport], halts: Sequence[str], silent_s: float) -> str:
    """Describe a cell whose processes finish no step; `halts` say of each process why it cannot continue, if known."""
    step = max(report.step for report in reports)
    names = [_process_name(report, reports) for report in reports]
    reasons = [f"{name} {halt}" for name, halt in zip(names, halts, strict=True) if halt]
    text = f"no step and no evaluation batch was finished for {silent_s:.0f} s after step {step}"
    return f"{text} (parallel.stall_timeout_s){': ' if reasons else ''}{', '.join(reasons)}"


def _describe_kill(reports: Sequence[ExitReport], *, aborted: bool = False) -> str | None:
    """Describe the first process that ended without a report, or return None.

    A process that aborted itself (SIGABRT) counts only with `aborted`: on GPUs the watchdog of the collectives aborts
    the processes that waited for another one.
    """
    for report in reports:
        name = _process_name(report, reports)
        if report.is_unreachable:
            return f"{name} is unreachable: no heartbeat from its node for {report.silent_s:.0f} s"
        code = report.exit_code
        if report.status is not None or code is None or (code == -signal.SIGABRT) != aborted:
            continue
        if code >= 0:
            return f"{name} ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-code).name}{hint}"
    return None


def _list_errors(reports: Sequence[ExitReport]) -> list[tuple[str, str]]:
    """Return fault and text of each error that was not caused by another process, with the rank if it is of one."""
    failed = [report for report in reports if report.error and report.fault == Fault.PROCESS_ERROR]
    common = [
        (report.fault, str(report.error)) for report in reports if report.fault in (Fault.COMMON_ERROR, Fault.DIVERGED)
    ]
    if failed and (len(reports) == 1 or {report.error for report in reports} == {failed[0].error}):
        return [(Fault.PROCESS_ERROR, str(failed[0].error))]
    return [(Fault.PROCESS_ERROR, f"{_process_name(report, reports)}: {report.error}") for report in failed] + common


def _describe_hang(reports: Sequence[ExitReport], timeout_s: float) -> str | None:
    """Describe the process that the others waited for, or return None."""
    timed_out = [report for report in reports if report.fault == Fault.TIMEOUT]
    aborted = [report for report in reports if report.status is None and report.exit_code == -signal.SIGABRT]
    alive = [report for report in reports if report.status is None and report.exit_code is None]
    if not timed_out and aborted:
        # The watchdog aborts after a timeout; if no process has been silent for long, there was another reason.
        alive = [report for report in alive if report.silent_s > timeout_s / 2]
    if alive and (timed_out or aborted or len(alive) < len(reports)):
        hung = max(alive, key=lambda report: report.silent_s)
        return f"{_process_name(hung, reports)} hung: no progress for {hung.silent_s:.0f} s after step {hung.step}"
    if not timed_out:
        return None
    last_step = max(report.step for report in timed_out)
    late = [report for report in reports if report.step < last_step]
    late = late or [report for report in reports if report.fault != Fault.TIMEOUT]
    if len(late) != 1:
        return None
    reason = f"was late: the others waited for {timeout_s:.0f} s (parallel.timeout_s)"
    return f"{_process_name(late[0], reports)} {reason} after step {late[0].step}"


def _describe_timeout(reports: Sequence[ExitReport], timeout_s: float) -> str | None:
    """Describe a timeout that no single process caused, or return None."""
    if all(report.fault != Fault.TIMEOUT for report in reports):
        return None
    step = min(report.step for report in reports)
    return f"the processes waited for each other for {timeout_s:.0f} s (parallel.timeout_s) after step {step}"


def _process_name(report: ExitReport, reports: Sequence[ExitReport]) -> str:
    return f"rank {report.rank}" if len(reports) > 1 else "the process"
