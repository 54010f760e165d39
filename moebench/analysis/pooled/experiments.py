"""Several experiments of one results folder: their comparisons, and the runs of a ladder of sizes."""

from collections.abc import Sequence
from pathlib import Path

from moebench.analysis.compare.experiment import compare_experiment
from moebench.analysis.compare.values import Split
from moebench.analysis.pooled.pool import Pooled, pool_comparisons
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment


def name_uniquely(experiments: Sequence[Experiment]) -> dict[str, Experiment]:
    """Return experiments by name; those with a name in common are called by their files.

    Raises UsageError for an experiment that is given twice, and for two that have a run in common.
    """
    names = [experiment.name for experiment in experiments]
    owners: dict[str, int] = {}
    for index, experiment in enumerate(experiments):
        for cell in experiment.cells:
            owner = owners.setdefault(cell.id, index)
            if owner != index:
                raise UsageError(
                    f"compare: '{experiments[owner].name}' and '{experiment.name}' have the run {cell.id} in common"
                    f" ({cell.arm}, seed {cell.seed}), which would count twice; give each run once"
                )
    return {each.file if names.count(each.name) > 1 else each.name: each for each in experiments}


def pool_experiments(
    experiments: Sequence[Experiment], results: Path, *, allow_mismatch: bool = False, split: Split = "test"
) -> Pooled:
    """Compare each experiment by itself and pool them; raise UsageError where one has no result."""
    return pool_comparisons(
        {
            name: compare_experiment(experiment, results, allow_mismatch=allow_mismatch, split=split)
            for name, experiment in name_uniquely(experiments).items()
        }
    )
