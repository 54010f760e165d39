"""The run that a word on the command line names."""

from pathlib import Path

from moebench.errors import UsageError, build_unknown_error
from moebench.runs.folder import RunFolder, list_run_folders


def find_run(results: Path, run: str) -> RunFolder:
    """Return the folder of the run whose id begins with `run`; raise UsageError unless exactly one does."""
    ids = [folder.path.name for folder in list_run_folders(results)]
    if not ids:
        raise UsageError(f"{results}: has no runs (train some with `moebench run`; --results, MOEBENCH_RESULTS)")
    matching = [run_id for run_id in ids if run and run_id.startswith(run)]
    if len(matching) > 1:
        raise UsageError(f"run: '{run}' matches {len(matching)} ids ({', '.join(matching)}); give a longer prefix")
    if not matching:
        raise build_unknown_error("run", run, ids)
    return RunFolder.of(results, matching[0])
