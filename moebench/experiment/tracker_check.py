"""`moebench verify` of a tracker: what it lacks, has twice or shows as running, as findings that can be repaired."""

from collections.abc import Callable, Iterator
from pathlib import Path

from moebench.errors import UsageError
from moebench.experiment.verification import Finding
from moebench.tracking.address import NO_TRACKER, default_uri, format_sync, redact_uri, sqlite_path
from moebench.tracking.database import find_database_damage
from moebench.tracking.mlflow_store import TrackerError


def check_tracker(results: Path, uri: str | None = None) -> Iterator[Finding]:
    """Yield what a tracker, by default the database in the folder, lacks, has twice or shows as running."""
    if uri == NO_TRACKER:
        return
    address = uri or default_uri(results)
    path = sqlite_path(address)
    where = str(path) if path else redact_uri(address)
    if path is not None:
        if not path.exists() or (path.is_file() and path.stat().st_size == 0):  # nothing was sent yet
            return
        damage = find_database_damage(path)
        if damage:
            remedy = f"move it away; {format_sync(results, uri)} fills a new one"
            yield Finding(where=where, problem=damage, remedy=remedy)
            return
    try:
        yield from _check_runs(results, address, where)
    except TrackerError as error:
        yield Finding(where=where, problem=str(error), remedy=f"when it is repaired, {format_sync(results, uri)}")


def _check_runs(results: Path, uri: str, where: str) -> Iterator[Finding]:
    from moebench.tracking.repairs import close_runs, drop_duplicates
    from moebench.tracking.replay import replay
    from moebench.tracking.stored_runs import audit_runs

    audits = audit_runs(results, uri)
    doubled = [audit for audit in audits if audit.doubled]
    if doubled:
        problem = f"{sum(len(audit.doubled) for audit in doubled)} points are there twice or more"
        remedy = "the earlier ones dropped" if sqlite_path(uri) else "their runs moved to its trash and sent again"
        fix = _repair(lambda: drop_duplicates(results, uri, doubled))
        yield Finding(where=where, problem=problem, remedy=remedy, fix=fix)
    num_missing = sum(len(audit.missing) for audit in audits)
    if num_missing:
        problem = f"{num_missing} points of the journals are missing"
        fix = _repair(lambda: replay(results, uri))
        yield Finding(where=where, problem=problem, remedy="sent", fix=fix)
    stale = [audit for audit in audits if audit.end_status]
    if stale:
        problem = f"{len(stale)} runs are shown as running and are not"
        yield Finding(where=where, problem=problem, remedy="closed", fix=_repair(lambda: close_runs(uri, stale)))


def _repair(fix: Callable[[], object]) -> Callable[[], None]:
    def repair() -> None:
        try:
            fix()
        except TrackerError as error:
            raise UsageError(str(error)) from error

    return repair
