"""What each arm has chosen in tuning, as a table, as notes and as failures of arms that can choose nothing."""

from collections.abc import Sequence

from moebench.experiment.trials import note_unequal_budgets, shorten_keys
from moebench.experiment.tuning import Choice, TuningState
from moebench.launch.failure import build_failed_result
from moebench.reporting.formatting import MISSING, format_number, format_plural, format_signed
from moebench.reporting.table import Column, Table
from moebench.runs.cell import Cell
from moebench.runs.result import Fault, RunResult

EDGE = "*"
"""Mark of a value at the edge of what was tried."""


def build_failed_results(state: TuningState, cells: Sequence[Cell]) -> list[RunResult]:
    """Return a failed result for each run of an arm that can choose nothing: its failure is an outcome of the arm."""
    failures = {choice.arm: choice for choice in state.failed}
    return [_build_failure(cell, failures[cell.arm]) for cell in cells if cell.arm in failures]


def _build_failure(cell: Cell, choice: Choice) -> RunResult:
    fault = Fault.DIVERGED if choice.has_diverged else Fault.PROCESS_ERROR
    return build_failed_result(cell.to_dict(""), str(choice.failure), fault=fault, step=0, total_s=0.0)


def build_tuning_table(state: TuningState | None) -> Table:
    """Return a row for each arm: its trials, what it has chosen and by how much; no row without tuning."""
    if state is None:
        return Table(columns=(Column(header="arm"),), rows=())
    names = shorten_keys(state.keys)
    columns = (
        Column(header="arm", align="left", wraps=True),
        *(Column(header=header) for header in ("trials", "failed", *names.values(), "validation", "2nd best")),
    )
    seeds = f"seed{'s' * (len(state.seeds) > 1)} {', '.join(map(str, state.seeds))}"
    length = f", in runs of {state.steps} steps" if state.steps else ""
    return Table(
        title=f"Tuning: what each arm has chosen on the validation split, {seeds}{length}",
        columns=columns,
        rows=tuple(_build_row(choice, state) for choice in state.choices),
        notes=tuple(f"{note}." for note in list_tuning_notes(state) if note.startswith(EDGE)),
    )


def _build_row(choice: Choice, state: TuningState) -> tuple[str, ...]:
    num_failed = sum(bool(result.problems) for result in choice.results)
    counts = (str(len(choice.results)), str(num_failed or MISSING))
    best = choice.chosen
    if best is None or best.mean is None:
        ended, num_runs = choice.count_runs()
        progress = "all failed" if choice.failure else f"{ended} of {num_runs} runs"
        return (choice.arm, *counts, *(MISSING for _ in state.keys), progress, MISSING)
    second = choice.ranking[1].mean if len(choice.ranking) > 1 else None
    return (
        choice.arm,
        *counts,
        *(_format_value(choice, key) for key in state.keys),
        format_number(best.mean),
        MISSING if second is None else format_signed(second - best.mean),
    )


def _format_value(choice: Choice, key: str) -> str:
    assert choice.chosen is not None
    settings = choice.chosen.trial.settings
    if key not in settings:
        return MISSING
    return f"{settings[key]}{EDGE if key in choice.edges else ''}"


def list_tuning_notes(state: TuningState | None) -> list[str]:
    """Return what a reader of the table must know: edges, ties, unequal budgets, trials that were cut short."""
    if state is None:
        return []
    counts = {choice.arm: len(choice.results) for choice in state.choices}
    keys = shorten_keys(state.keys)
    edges = {
        f"{choice.arm} ({', '.join(keys[key] for key in choice.edges)})" for choice in state.choices if choice.edges
    }
    notes = []
    if edges:
        listed = ", ".join(sorted(edges))
        notes.append(f"{EDGE} the smallest or largest value tried: a better one may lie beyond it: {listed}")
    notes += [
        f"{choice.arm}: {format_plural(len(choice.ties), 'other trial')} with the same validation value; the first of"
        " the grid is taken"
        for choice in state.choices
        if choice.ties
    ]
    notes += note_unequal_budgets(counts)
    waiting = [f"{choice.arm} ({choice.describe_progress()})" for choice in state.unfinished]
    if waiting:
        notes.append(f"not tuned yet, so not trained: {', '.join(waiting)}")
    return notes
