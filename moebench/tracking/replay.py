"""Replay: send what run folders hold and a tracker lacks. Repeatable after any crash; each point is sent once."""

from collections.abc import Callable
from pathlib import Path

from moebench.errors import build_unknown_error
from moebench.tracking.locks import hold_lock
from moebench.tracking.mlflow_store import MlflowStore, TrackerError
from moebench.tracking.report import ReplayReport
from moebench.tracking.sender import Sender
from moebench.tracking.source import RunSource, list_recorded_experiments

_LOCK_TIMEOUT_S = 600


def replay(
    results: Path,
    uri: str,
    experiment_name: str | None = None,
    live: bool = False,
    on_progress: Callable[[], None] = lambda: None,
) -> ReplayReport:
    """Send everything that the tracker does not have yet, of one experiment or of all.

    Each batch carries the cursor of its run as a tag, and the tracker is asked which values it has of steps that may
    have been sent before, so nothing is duplicated. The points of a run without a result are sent up to its last
    checkpoint, since a crash would repeat later ones. With `live` such runs are still running, otherwise they are
    marked KILLED. `on_progress` is called after every call that the tracker has answered. Raises TrackerError when the
    tracker cannot be used and UsageError for an unknown experiment.
    """
    from filelock import Timeout

    experiments = list_recorded_experiments(results)
    if experiment_name is not None and experiment_name not in experiments:
        raise build_unknown_error("experiment", experiment_name, experiments)
    report = ReplayReport()
    try:
        with hold_lock(results / ".tracking.lock", _LOCK_TIMEOUT_S, on_progress):
            for name in [experiment_name] if experiment_name is not None else sorted(experiments):
                store = MlflowStore(uri, name, on_progress)
                report += Sender(results, store, live=live).send(experiments[name])
    except Timeout as error:
        raise TrackerError(f"{results}: another process is sending to a tracker") from error
    except OSError as error:
        raise TrackerError(f"{results} cannot be written ({error})") from error
    return report


def fingerprint_sources(results: Path, experiment_name: str | None = None) -> tuple[tuple[str, int, int], ...]:
    """Return a value that changes when there may be something new to send, without contacting the tracker."""
    fingerprints = []
    for name, experiment in list_recorded_experiments(results).items():
        for cell in experiment["cells"] if experiment_name in (None, name) else ():
            source = RunSource.of(results, cell["id"])
            if source.has_started:
                times_ns = [path.stat().st_mtime_ns for path in source.attachments]
                fingerprints.append((cell["id"], source.folder.checkpointed_step, max(times_ns, default=0)))
    return tuple(fingerprints)
