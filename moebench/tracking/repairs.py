"""Repair what `audit_runs` reports, in any tracker; nothing that was measured is changed."""

import time
from collections.abc import Sequence
from pathlib import Path

from filelock import Timeout

from moebench.tracking.address import sqlite_path
from moebench.tracking.database import drop_duplicate_points
from moebench.tracking.locks import hold_lock
from moebench.tracking.mlflow_store import MlflowStore, TrackerError
from moebench.tracking.replay import replay
from moebench.tracking.stored_runs import RunAudit

_LOCK_TIMEOUT_S = 60


def drop_duplicates(results: Path, uri: str, audits: Sequence[RunAudit]) -> None:
    """Leave one of the points that a tracker has twice: that of the journal, which is the latest.

    A database drops the others. A server has no call for it: the run goes to its trash, and is sent again. Raises
    TrackerError when the tracker cannot be used.
    """
    path = sqlite_path(uri)
    if path is None:
        for audit in audits:
            MlflowStore(uri, audit.experiment, read_only=True).delete(audit.run_id)
        replay(results, uri)
        return
    try:
        with hold_lock(results / ".tracking.lock", _LOCK_TIMEOUT_S, lambda: None):
            drop_duplicate_points(path, [audit.run_id for audit in audits])
    except Timeout as error:
        raise TrackerError(f"{results}: another process is sending to a tracker") from error


def close_runs(uri: str, audits: Sequence[RunAudit]) -> None:
    """Set the status of runs that have ended; raise TrackerError when the tracker cannot be used."""
    for audit in audits:
        store = MlflowStore(uri, audit.experiment, read_only=True)
        for run in store.runs():
            if run.id == audit.run_id and run.status == "RUNNING":  # another repair may have sent it again
                store.set_status(run.id, audit.end_status, max(int(1000 * time.time()), run.start_ms))
