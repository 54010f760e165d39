"""The reports of `moebench compare`: one experiment, several that are pooled, or effective compute over sizes."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moebench.cli.options import add_size, check_plot
from moebench.errors import UsageError
from moebench.experiment.files import find_experiment

if TYPE_CHECKING:
    from moebench.analysis.compare.values import Split
    from moebench.analysis.fairness.run_curve import Axis
    from moebench.experiment.grid import Experiment
    from moebench.reporting.report import Report


DETAILS_HINT = "--details: p values, effect sizes, power, pairing, and what each column and mark means."


@dataclass(frozen=True)
class CompareOptions:
    """What to compare by, and what to add."""

    split: "Split"
    allow_mismatch: bool
    effective_compute: bool = False
    axis: "Axis | None" = None
    plot: Path | None = None
    margin: float | None = None
    details: bool = True
    """Whether to add p values, effect sizes, pairing and the legend to the report of one experiment."""


def check_compare_options(choice: CompareOptions) -> None:
    """Raise UsageError for an invalid figure file or margin, before anything is read."""
    check_plot(choice.plot)
    if choice.margin is not None:
        from moebench.schema import check_margin

        check_margin(choice.margin, "--margin")


def compare_one(grid: "Experiment", results: Path, choice: CompareOptions) -> "Report":
    """Compare the arms of one experiment, and draw the figure."""
    from moebench.analysis.compare.experiment import compare_experiment, draw_experiment
    from moebench.analysis.compare.report import build_report
    from moebench.analysis.fairness.along_axis import AXIS_LABELS, read_along_axis
    from moebench.analysis.fairness.experiment import measure_experiment
    from moebench.analysis.fairness.measure import compare_on_axes
    from moebench.analysis.fairness.report import add_fairness
    from moebench.analysis.transfer.experiment import measure_transfer
    from moebench.analysis.transfer.report import add_transfer

    gc.freeze()  # collections need not look at the imported modules: hundreds of runs are read below
    comparison = compare_experiment(
        grid, results, allow_mismatch=choice.allow_mismatch, split=choice.split, margin=choice.margin
    )
    arms = measure_experiment(grid, results, comparison)
    along = read_along_axis(arms, choice.axis) if choice.axis else None
    if choice.plot:
        x_axis = (AXIS_LABELS[along.axis], along.map_steps()) if along else None
        draw_experiment(grid, results, choice.plot, comparison, x_axis)
    fairness = compare_on_axes(arms, ignore_conditions=choice.allow_mismatch)
    report = add_transfer(add_fairness(build_report(comparison), fairness, along), measure_transfer(grid, results))
    return report if choice.details else report.without_details(DETAILS_HINT)


def compare_experiments(grids: "Sequence[Experiment]", results: Path, choice: CompareOptions) -> "Report":
    """Compare the arms of one experiment, pool several, or estimate effective compute over them."""
    if len(grids) == 1 and not choice.effective_compute:
        return compare_one(grids[0], results, choice)
    given = {"--plot": choice.plot, "--axis": choice.axis, "--margin": choice.margin}
    if options := [option for option, value in given.items() if value is not None]:
        raise UsageError(f"{options[0]}: is for one experiment, got {', '.join(grid.name for grid in grids)}")
    if choice.effective_compute:
        from moebench.analysis.pooled.effective_report import build_ladder_report
        from moebench.analysis.pooled.ladder import read_ladder

        ladder = read_ladder(grids, results, choice.split, ignore_conditions=choice.allow_mismatch)
        return build_ladder_report(ladder)
    from moebench.analysis.pooled.experiments import pool_experiments
    from moebench.analysis.pooled.report import build_pooled_report

    pooled = pool_experiments(grids, results, allow_mismatch=choice.allow_mismatch, split=choice.split)
    return build_pooled_report(pooled)


def expand_all(
    subjects: Sequence[str],
    overrides: Sequence[str],
    sizes: Sequence[str | None],
    plugins: Sequence[str],
    results: Path,
) -> "list[Experiment]":
    """Return every experiment at every size."""
    from moebench.experiment.grid import expand

    return [
        expand(find_experiment(subject), add_size(overrides, size), plugins, finished_in=results)
        for subject in subjects
        for size in sizes
    ]


def require_one_size(routers: Sequence[str], sizes: Sequence[str] | None, *, effective_compute: bool) -> None:
    """Raise UsageError for options that are for experiments of several sizes."""
    option = "--effective-compute" if effective_compute else "--size" if len(sizes or ()) > 1 else ""
    if option:
        raise UsageError(f"{option}: several sizes are for experiments, got routers: {', '.join(routers)}")
