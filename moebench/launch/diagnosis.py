"""How a cell ended, from how its processes ended: when one fails the others fail too, and only one is to blame."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebench.runs.result import Fault

OWN, COMMON, WAITED, LOST = "own", "common", "waited", "lost"
"""Faults: an error of one process; the same error in all by design; another was waited for in vain; it hung up.

One more, `DIVERGED`, is the same error in all as well, and kept apart because it is an outcome of the algorithm.
"""
OUTSIDE = "outside"
"""Killed, hung or gone: nothing that the program itself said."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one process ended."""

    rank: int
    step: int = 0
    """The last that it is known to have finished."""
    status: str | None = None
    """Its last word: done, stopped, found, busy or failed; None: it said nothing."""
    error: str | None = None
    fault: str = ""
    """What kind of error."""
    exit_code: int | None = None
    """Minus the signal that killed it; None: it did not end by itself."""
    is_gone: bool = False
    """On another node, and nobody there answers."""
    silent_s: float = 0.0
    """Since its last sign of life."""
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How the cell ended: done, stopped, found, busy or failed, and of a failure what kind."""

    status: str
    error: str | None = None
    fault: str = ""
    metrics: dict[str, float] = field(default_factory=dict)


def judge(endings: Sequence[Ending], timeout_s: float) -> Verdict:
    """Return how a cell ended, with the first cause; `endings` by rank, `timeout_s`: how long they wait for each other.

    The first process writes the result: when it is through, so is the cell.
    """
    first = endings[0]
    if first.status not in (None, "failed"):
        return Verdict(status=str(first.status), error=first.error, metrics=first.metrics)
    for fault, error in (
        (OUTSIDE, _killed(endings)),
        *_errors(endings),
        (OUTSIDE, _hung(endings, timeout_s)),
        (OUTSIDE, _killed(endings, aborted=True)),
        (WAITED, _all_waited(endings, timeout_s)),
        *((ending.fault, f"{_name(ending, endings)}: {ending.error}") for ending in endings if ending.error),
    ):
        if error:
            return Verdict(status="failed", error=error, fault=fault)
    return Verdict(status="failed", error="no process said why", fault=OUTSIDE)


def _killed(endings: Sequence[Ending], *, aborted: bool = False) -> str | None:
    """Name the process that ended without a word.

    One that aborts itself is looked at later: on GPUs that is how those end that have waited in vain.
    """
    for ending in endings:
        name = _name(ending, endings)
        if ending.is_gone:
            return f"{name} is unreachable: no heartbeat from its node for {ending.silent_s:.0f} s"
        code = ending.exit_code
        if ending.status is not None or code is None or (code == -signal.SIGABRT) != aborted:
            continue
        if code >= 0:
            return f"{name} ended with exit code {code}"
        hint = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"{name} was killed by {signal.Signals(-code).name}{hint}"
    return None


def _errors(endings: Sequence[Ending]) -> list[tuple[str, str]]:
    """Return the errors that are not about other processes; of one process alone with its rank."""
    own = [ending for ending in endings if ending.error and ending.fault == OWN]
    common = [(ending.fault, str(ending.error)) for ending in endings if ending.fault in (COMMON, Fault.DIVERGED)]
    if own and (len(endings) == 1 or {ending.error for ending in endings} == {own[0].error}):
        return [(OWN, str(own[0].error))]
    return [(OWN, f"{_name(ending, endings)}: {ending.error}") for ending in own] + common


def _hung(endings: Sequence[Ending], timeout_s: float) -> str | None:
    """Name the process that others waited for."""
    waited = [ending for ending in endings if ending.fault == WAITED]
    # Aborted by the watchdog of a GPU's collectives, or for another reason: then nobody has been silent for long.
    aborted = [ending for ending in endings if ending.status is None and ending.exit_code == -signal.SIGABRT]
    alive = [ending for ending in endings if ending.status is None and ending.exit_code is None]
    if not waited and aborted:
        alive = [ending for ending in alive if ending.silent_s > timeout_s / 2]
    if alive and (waited or aborted or len(alive) < len(endings)):
        ending = max(alive, key=lambda ending: ending.silent_s)
        return f"{_name(ending, endings)} hung: no progress for {ending.silent_s:.0f} s after step {ending.step}"
    if not waited:
        return None
    behind = [ending for ending in endings if ending.step < max(waited, key=lambda ending: ending.step).step]
    late = behind or [ending for ending in endings if ending.fault != WAITED]
    if len(late) != 1:
        return None
    what = f"was late: the others waited for {timeout_s:.0f} s (parallel.timeout_s)"
    return f"{_name(late[0], endings)} {what} after step {late[0].step}"


def _all_waited(endings: Sequence[Ending], timeout_s: float) -> str | None:
    """Say that nobody can be blamed."""
    waited = [ending for ending in endings if ending.fault == WAITED]
    if not waited:
        return None
    step = min(ending.step for ending in endings)
    return f"the processes waited for each other for {timeout_s:.0f} s (parallel.timeout_s) after step {step}"


def _name(ending: Ending, endings: Sequence[Ending]) -> str:
    return f"rank {ending.rank}" if len(endings) > 1 else "the process"
