"""Run an experiment in its phases: earlier stages, the tuning runs, then the arms with what each has chosen.

Each phase is an experiment for the runner. Every runner of the grid computes the choices from the results on disk,
so that several of them need no other agreement: one that has no run of a phase left waits for those of the others.
"""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from moebench.experiment.data_need import require_epochs
from moebench.experiment.grid import Experiment
from moebench.experiment.model_costs import ModelCosts
from moebench.experiment.parent_overlap import require_no_overlap
from moebench.experiment.parents import require_parents
from moebench.experiment.run_setup import RunSetup
from moebench.experiment.runner import RunReport, describe_state, print_note, run_experiment
from moebench.experiment.stage_runs import StageReport, build_stage_experiments, list_earlier_cells
from moebench.experiment.store import open_results, record_experiment
from moebench.experiment.tuning import Choice, apply_choices, build_tuning_experiment, read_tuning
from moebench.experiment.tuning_report import TuningReport
from moebench.interrupts import handle_signals
from moebench.launch.scheduler import Outcome
from moebench.reporting.formatting import format_plural
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder

POLL_INTERVAL_S = 1.0
"""How often a runner looks whether the runs of another one have ended."""


def run_phases(experiment: Experiment, setup: RunSetup) -> RunReport:
    """Train what is missing of an experiment, as `run_experiment` does, what comes before its cells first."""
    if experiment.tuning is None and not experiment.stages:
        return run_experiment(experiment, setup)
    earlier = list_earlier_cells(experiment)
    setup.launcher.check([*earlier, *experiment.cells])
    open_results(setup.results)
    costs = ModelCosts(setup.results)
    require_epochs([*earlier, *experiment.cells], costs)  # now, not when others have been trained
    require_parents([*earlier, *experiment.cells], costs)
    require_no_overlap([*earlier, *experiment.cells], costs)
    for note in experiment.notes:
        print_note(setup.console, note)
    experiment = replace(experiment, notes=())
    if not earlier:
        return _run_tuned(experiment, setup)
    if experiment.tuning is None:
        record_experiment(setup.results, experiment)  # its seeds are planned before anything is trained
    before = run_stages(experiment, setup)
    summary = _summarise_stages(before, earlier, setup.results)
    if before and (before[-1].interrupted or (setup.options.fail_fast and summary.failed)):
        return replace(before[-1], experiment=experiment, num_done=0, outcomes=[], stages=summary)
    return merge_problems(before, replace(_run_tuned(experiment, setup), stages=summary))


def run_stages(experiment: Experiment, setup: RunSetup) -> list[RunReport]:
    """Train the runs of earlier stages that an experiment needs; return the report of each stage.

    It ends at a stage that is interrupted or, with `fail_fast`, has a failure.
    """
    reports: list[RunReport] = []
    for stage in build_stage_experiments(experiment):
        runs = format_plural(len(stage.cells), "run")
        print_note(setup.console, f"stage {stage.cells[0].stage}: {runs} that later ones start from")
        report, outcomes = _run_before_others(stage, setup)
        reports.append(replace(report, outcomes=outcomes))
        if report.interrupted or (setup.options.fail_fast and reports[-1].failed):
            break
    return reports


def _summarise_stages(reports: Sequence[RunReport], cells: Sequence[Cell], results: Path) -> StageReport:
    num_done = sum(describe_state(results, cell) == "done" for cell in cells)
    outcomes = [outcome for report in reports for outcome in report.outcomes]
    return StageReport(num_cells=len(cells), num_done=num_done, outcomes=outcomes)


def merge_problems(earlier: Sequence[RunReport], report: RunReport) -> RunReport:
    """Return a report with the problems of earlier ones."""
    reports = [*earlier, report]
    tracker = next((each.tracker_problem for each in reports if each.tracker_problem), None)
    return replace(report, tracker_problem=tracker, problems=[line for each in reports for line in each.problems])


def _run_tuned(experiment: Experiment, setup: RunSetup) -> RunReport:
    """Train the tuning runs of an experiment, if it has any, and its cells."""
    if experiment.tuning is None:
        return run_experiment(experiment, setup)
    tuning = build_tuning_experiment(experiment)
    print_note(setup.console, f"phase 1 of 2: tuning, {describe_tuning(experiment)}")
    options = replace(setup.options, fail_fast=False)  # a failed trial is the worst, no reason to stop
    report, outcomes = _run_before_others(tuning, replace(setup, options=options))
    state = read_tuning(experiment, setup.results)
    assert state is not None
    settled = apply_choices(experiment, state)
    if settled.cells:
        record_experiment(setup.results, settled)
    summary = TuningReport(state=state, outcomes=outcomes, num_final_cells=len(experiment.cells))
    if report.interrupted or state.unfinished or not settled.cells:
        return replace(report, experiment=settled, num_done=0, outcomes=[], tuning=summary)
    for choice in state.choices:
        print_note(setup.console, describe_choice(choice))
    print_note(
        setup.console,
        f"phase 2 of 2: {format_plural(len(settled.cells), 'run')} with the settings that each arm has chosen",
    )
    return merge_problems([report], replace(run_experiment(settled, setup), tuning=summary))


def _run_before_others(phase: Experiment, setup: RunSetup) -> tuple[RunReport, list[Outcome]]:
    """Run a phase until no run of it is left, not at another runner either; return its outcomes too."""
    outcomes: list[Outcome] = []
    while True:
        report = run_experiment(phase, setup)
        outcomes += [outcome for outcome in report.outcomes if outcome.status != "busy"]
        busy = [outcome for outcome in report.outcomes if outcome.status == "busy"]
        if report.interrupted or not busy:
            return report, [*outcomes, *busy]
        runs = format_plural(len(busy), "tuning run" if phase.tuning_of else "run")
        reason = "the choice needs all of them" if phase.tuning_of else "later stages start from them"
        print_note(setup.console, f"waiting for {runs} of another runner: {reason}")
        number = _wait_for_others([outcome.cell for outcome in busy], setup)
        if number:
            return replace(report, interrupted=number), [*outcomes, *busy]
        if all(RunFolder.of(setup.results, outcome.cell.id).result.exists() for outcome in busy):
            return report, outcomes


def _wait_for_others(cells: Sequence[Cell], setup: RunSetup) -> int:
    """Wait until nobody trains the cells; return the number of a signal that ended the wait, 0 for none."""
    signals: list[int] = []
    with handle_signals(signals.append):
        while any(RunFolder.of(setup.results, cell.id).is_being_trained() for cell in cells):
            time.sleep(POLL_INTERVAL_S)
            stop_signal = setup.launcher.stop_signal()
            if signals or stop_signal is not None:
                return signals[0] if signals else int(stop_signal or 0)
    return 0


def describe_tuning(experiment: Experiment) -> str:
    """Return in a few words what the tuning phase trains."""
    assert experiment.tuning is not None
    counts = sorted({len(arm.trials) for arm in experiment.tuning.arms})
    trials = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    seeds = format_plural(len(experiment.tuning.seeds), "seed")
    num_runs = sum(len(trial.cells) for arm in experiment.tuning.arms for trial in arm.trials)
    return f"{format_plural(num_runs, 'run')}: {trials} trials of each arm, {seeds} each"


def describe_choice(choice: Choice) -> str:
    """Return in one line what an arm has chosen."""
    if choice.chosen is None:
        return f"{choice.arm}: {choice.failure}; it is not trained"
    edge = f" (at the edge of the grid: {', '.join(choice.edges)})" if choice.edges else ""
    return f"{choice.arm} takes {choice.chosen.trial.label}{edge}"
