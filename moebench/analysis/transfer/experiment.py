"""The transfer of an experiment: each arm beside its parents, and beside the arm of the baseline's kind."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moebench.analysis.compare.experiment import list_trained_cells, read_results
from moebench.analysis.compare.matching import check_matching
from moebench.analysis.transfer.measure import RunTransfer, TransferReader
from moebench.analysis.transfer.values import (
    ArmTransfer,
    Transfer,
    compare_with_reference,
    correct_changes,
    summarise_arm,
)
from moebench.errors import UsageError
from moebench.experiment.grid import Experiment
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder
from moebench.tasks.task import TASKS


def measure_transfer(experiment: Experiment, results: Path) -> Transfer | None:
    """Return what arms that start from a run on other data gain and forget; None where no arm does.

    Runs that are not finished are left out; a run that cannot be measured is named in a note.
    """
    cells = [cell for cell in list_trained_cells(experiment, results) if cell.config.init.has_parent]
    if not cells:
        return None
    facts = TASKS.get(cells[0].config.task.name).facts
    runs, notes = _read_runs(cells, results)
    arms = {
        arm: summarise_arm(arm, of_arm, lower_is_better=facts.lower_is_better) for arm, of_arm in runs.items() if of_arm
    }
    if not arms and not notes:
        return None
    for arm, summary in arms.items():
        reference = find_reference(arm, arms, experiment)
        if reference is not None and summary.target == arms[reference].target:
            gain, loss = compare_with_reference(summary, arms[reference], lower_is_better=facts.lower_is_better)
            marks = _find_marks(arm, reference, cells, results)
            summary = replace(summary, reference=reference, reference_marks=marks)
            arms[arm] = replace(summary, gain_difference=gain, forgetting_difference=loss)
    return Transfer(metric=facts.metric, arms=tuple(_correct(arms)), notes=tuple(notes))


def _find_marks(arm: str, reference: str, cells: Sequence[Cell], results: Path) -> tuple[str, ...]:
    """Return in what the finished runs of an arm are not matched with those of the arm that it is compared with."""
    runs = {
        name: [
            run for run in read_results([cell for cell in cells if cell.arm == name], results) if run.status == "done"
        ]
        for name in (reference, arm)
    }
    return tuple(mismatch.mark for mismatch in check_matching(runs, reference, allow=True).get(arm, ()))


def _correct(arms: Mapping[str, ArmTransfer]) -> Iterator[ArmTransfer]:
    """Yield the arms with p values that are corrected over all of them, a family for each column."""
    gain = correct_changes({arm: summary.gain for arm, summary in arms.items()})
    forgetting = correct_changes({arm: summary.forgetting for arm, summary in arms.items()})
    gain_difference = correct_changes({arm: summary.gain_difference for arm, summary in arms.items()})
    loss_difference = correct_changes({arm: summary.forgetting_difference for arm, summary in arms.items()})
    for arm, summary in arms.items():
        yield replace(
            summary,
            gain=gain[arm] or summary.gain,
            forgetting=forgetting[arm],
            gain_difference=gain_difference[arm],
            forgetting_difference=loss_difference[arm],
        )


def _read_runs(cells: Sequence[Cell], results: Path) -> tuple[dict[str, list[RunTransfer]], list[str]]:
    reader = TransferReader(results)
    runs: dict[str, list[RunTransfer]] = {}
    notes: list[str] = []
    for cell in cells:
        runs.setdefault(cell.arm, [])
        if not RunFolder.of(results, cell.id).cell.exists():
            continue
        try:
            run = reader.read(cell.id)
        except UsageError as error:
            notes.append(f"{cell.arm}, seed {cell.seed}: {error}")
            continue
        if run is not None:
            runs[cell.arm].append(run)
    return runs, list(dict.fromkeys(notes))


def find_reference(arm: str, arms: Mapping[str, ArmTransfer], experiment: Experiment) -> str | None:
    """Return the arm that is of the baseline's kind and equal to an arm in all other axes; None for itself.

    The kind is the label on the first axis of the grid that the baseline has. Axes that mean nothing to one of the two
    do not count.
    """
    axes = experiment.axes
    first = next(iter(axes.get(experiment.baseline, {})), None)
    if first is None:
        return None
    kind = axes[experiment.baseline][first]
    ours = axes.get(arm, {})
    if ours.get(first) == kind:
        return None
    matching = [
        other
        for other in arms
        if axes.get(other, {}).get(first) == kind
        and all(ours[key] == label for key, label in axes[other].items() if key != first and key in ours)
    ]
    return matching[0] if len(matching) == 1 else None
