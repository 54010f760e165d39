"""`moebench run --until decided`: the planned seeds, then more seeds for the arms that are still undecided.

What is decided at the first look is a function of the results of the planned seeds, and is recorded before the first
added run begins: a run that is interrupted and started again ends with the same cells and verdicts.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from moebench.analysis.compare.experiment import compare_experiment, read_plan
from moebench.analysis.compare.values import Comparison
from moebench.errors import UsageError, require
from moebench.experiment.grid import Experiment
from moebench.experiment.phases import run_phases, run_stages
from moebench.experiment.run_setup import RunSetup
from moebench.experiment.runner import RunReport, print_note, run_experiment
from moebench.experiment.seed_plan import MIN_TESTED_SEEDS, SeedDesign, SeedPlan, Seeds, list_added_cells
from moebench.experiment.store import record_experiment
from moebench.schema import MAX_CELLS

UNDECIDED = "undecided"
"""The verdict that more seeds can change."""


@dataclass(frozen=True, kw_only=True)
class DecisionReport:
    """What a run until decisions ended with."""

    run: RunReport
    design: SeedDesign
    added: Mapping[str, Seeds]
    """Arm -> seeds that it has beyond those of the file."""
    verdicts: Mapping[str, str]
    """Arm -> verdict after all runs; empty where the planned seeds are not complete."""

    def list_lines(self) -> list[str]:
        """Return the verdicts in words, one line for each arm."""
        first = len(self.design.seeds)
        return [
            f"{arm}: {verdict}, {first + len(self.added.get(arm, ()))} seeds" for arm, verdict in self.verdicts.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "planned_seeds": len(self.design.seeds),
            "max_seeds": self.design.maximum,
            "added": {arm: list(seeds) for arm, seeds in self.added.items()},
            "verdicts": dict(self.verdicts),
        }


def run_until_decided(experiment: Experiment, setup: RunSetup, max_seeds: int) -> DecisionReport:
    """Run the planned seeds, then those up to `max_seeds` of every undecided arm and of the baseline.

    Raises UsageError for a maximum that adds no seed, and for too few planned seeds to test anything.
    """
    design = _plan_seeds(experiment, max_seeds)
    experiment = replace(experiment, design=design)
    report = run_phases(experiment, setup)
    is_stopped = setup.options.fail_fast and report.failed
    if report.interrupted or is_stopped or not report.num_done:
        return DecisionReport(run=report, design=design, added={}, verdicts={})
    plan, _ = read_plan(experiment, setup.results)
    added = _choose_added(experiment, setup, plan)
    if added:
        report = _run_added(report, setup, added)
    verdicts = {} if report.interrupted else _list_verdicts(compare_experiment(experiment, setup.results))
    return DecisionReport(run=report, design=design, added=added, verdicts=verdicts)


def _plan_seeds(experiment: Experiment, max_seeds: int) -> SeedDesign:
    assert experiment.design is not None
    planned, num_arms = len(experiment.design.seeds), len(experiment.arms)
    require(
        planned >= MIN_TESTED_SEEDS, "seeds", list(experiment.design.seeds), f"at least {MIN_TESTED_SEEDS} with --until"
    )
    highest = MAX_CELLS // num_arms
    allowed = f"{planned + 1} to {highest}: more than the {planned} planned seeds, at most {MAX_CELLS} cells in all"
    require(planned < max_seeds <= highest, "--max-seeds", max_seeds, allowed)
    design = replace(experiment.design, maximum=max_seeds)
    if max(design.final_seeds) >= 2**31:
        raise UsageError(f"seeds: {max(design.seeds)} leaves no numbers for added ones (allowed: below 2^31)")
    return design


def _choose_added(experiment: Experiment, setup: RunSetup, plan: SeedPlan) -> dict[str, Seeds]:
    """Return the seeds that arms get: those that the record has, and all up to the maximum for undecided arms."""
    assert experiment.design is not None
    seeds = experiment.design.final_seeds[len(experiment.design.seeds) :]
    first = compare_experiment(experiment, setup.results, with_added_seeds=False)
    now = _list_verdicts(compare_experiment(experiment, setup.results)) if plan.added else {}
    verdicts = {arm: now.get(arm, "") if arm in plan.added else value for arm, value in _list_verdicts(first).items()}
    incomplete = {cell.arm for cell in (*first.failed, *first.missing)}
    for arm in incomplete & verdicts.keys():
        print_note(setup.console, f"{arm}: no seeds are added, because planned runs of it have no result")
    if experiment.baseline in incomplete:
        return dict(plan.added)
    undecided = [
        arm
        for arm, verdict in verdicts.items()
        if verdict == UNDECIDED and arm not in incomplete and not set(seeds) <= set(plan.added.get(arm, ()))
    ]
    if not undecided:
        return dict(plan.added)
    numbers, arms = ", ".join(map(str, seeds)), ", ".join(undecided)
    print_note(
        setup.console,
        f"{len(undecided)} of {len(verdicts)} arms undecided: {arms} and {experiment.baseline} get the seeds {numbers}",
    )
    return {**plan.added, **dict.fromkeys((experiment.baseline, *undecided), seeds)}


def _run_added(report: RunReport, setup: RunSetup, added: Mapping[str, Seeds]) -> RunReport:
    """Run the added seeds; return the report of all runs together."""
    experiment = replace(report.experiment, notes=())
    record_experiment(setup.results, experiment, added)
    cells = list_added_cells(experiment.cells, added)
    failed = {outcome.cell.id for outcome in report.failed}  # they would fail once more
    tried = [cell for cell in experiment.cells if cell.id not in failed]
    before = run_stages(replace(experiment, cells=tuple(cells), tuning=None), setup)
    if before and before[-1].interrupted:
        return replace(report, interrupted=before[-1].interrupted)
    second = run_experiment(replace(experiment, cells=(*tried, *cells)), setup)
    record_experiment(setup.results, experiment)
    num_cells = len(experiment.cells) + len(cells)
    return replace(
        second,
        experiment=replace(experiment, cells=(*experiment.cells, *cells)),
        outcomes=[*report.outcomes, *(outcome for stage in before for outcome in stage.failed), *second.outcomes],
        stages=report.stages,
        tracker_problem=report.tracker_problem or second.tracker_problem,
        problems=[*report.problems, *second.problems],
        tuning=replace(report.tuning, num_final_cells=num_cells) if report.tuning else None,
    )


def _list_verdicts(comparison: Comparison) -> dict[str, str]:
    return {difference.arm: difference.verdict for difference in comparison.differences}
