"""The runs that belong together: a run, the other seeds of its arm, and the dense run of each seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moebench.analysis.stored_run import StoredRun, find_dense_runs, find_other_seeds, find_stored_run


@dataclass(frozen=True, kw_only=True)
class SeedPair:
    """A run and the dense run of the same seed; None where there is none."""

    run: StoredRun
    dense: StoredRun | None


def find_pairs(results: Path, subject: str, plugins: Sequence[str] = ()) -> tuple[SeedPair, ...]:
    """Return the run and then the other finished seeds of its arm, each with its dense reference.

    Raises UsageError for an unknown run, one that is not done, a plug-in that is not given, and changed data.
    """
    run = find_stored_run(results, subject, plugins)
    run.require_done("compute")
    dense = find_dense_runs(run, results)
    return tuple(SeedPair(run=each, dense=dense.get(each.seed)) for each in (run, *find_other_seeds(run, results)))
