"""The runs of earlier stages: an experiment of their own for each stage, trained before what starts from them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.experiment.cells import list_ancestors
from moebench.experiment.grid import Experiment
from moebench.experiment.tuning import list_tuning_cells
from moebench.launch.failure import build_failed_result
from moebench.launch.scheduler import Outcome
from moebench.reporting.formatting import format_plural
from moebench.runs.cell import Cell
from moebench.runs.folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class StageReport:
    """What one call of `run` has done in the stages before the last one."""

    num_cells: int
    num_done: int
    """Runs that are done after the call."""
    outcomes: Sequence[Outcome] = field(default_factory=tuple)
    """Runs of this call."""

    @property
    def failed(self) -> list[Outcome]:
        """Runs that failed, or are being trained by another process."""
        return [outcome for outcome in self.outcomes if outcome.status in ("failed", "busy")]

    def list_lines(self) -> list[str]:
        """Return the line for the end of a run."""
        return [f"earlier stages: {self.num_done} of {format_plural(self.num_cells, 'run')} done"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        trained = [outcome.cell.id for outcome in self.outcomes if outcome.status == "done"]
        return {"runs": self.num_cells, "done": self.num_done, "trained": trained}


def list_earlier_cells(experiment: Experiment) -> list[Cell]:
    """Return the runs of earlier stages that the cells of an experiment and its tuning runs need, first stage first."""
    cells = list_ancestors([*list_tuning_cells(experiment), *experiment.cells])
    order = {name: number for number, name in enumerate(experiment.stages)}
    return sorted(cells, key=lambda cell: order[cell.stage])


def build_stage_experiments(experiment: Experiment) -> list[Experiment]:
    """Return the earlier stages as experiments with a record, a tracker and a name of their own: EXPERIMENT-STAGE."""
    cells: dict[str, list[Cell]] = {}
    for cell in list_earlier_cells(experiment):
        cells.setdefault(cell.stage, []).append(cell)
    return [
        Experiment(
            name=f"{experiment.name}-{stage}",
            file=experiment.file,
            question=f"What do the arms of {experiment.name} start from? Stage {stage}.",
            baseline=of_stage[0].arm,
            cells=tuple(of_stage),
            notes=(),
            stages=experiment.stages,
            stage_of=experiment.name,
        )
        for stage, of_stage in cells.items()
    ]


def describe_missing_parent(results: Path, cell: Cell) -> str | None:
    """Return in one line why a cell cannot start: the first of its parents without a finished run; else None."""
    for parent in cell.parents:
        name = f"{parent.arm}, seed {parent.seed} of stage {parent.stage} (run {parent.id})"
        try:
            result = RunFolder.of(results, parent.id).read_result()
        except UsageError as error:
            return f"init.from: {name} is damaged: {error}"
        if result is None:
            return f"init.from: {name} has no result"
        if result.status != "done":
            return f"init.from: {name} {result.status}: {result.error or 'it is not done'}"
    return None


def split_orphans(results: Path, cells: Sequence[Cell]) -> tuple[list[Cell], list[Outcome]]:
    """Return the cells that can start, and a failure for each cell whose parent has no finished run."""
    reasons = [describe_missing_parent(results, cell) for cell in cells]
    ready = [cell for cell, reason in zip(cells, reasons, strict=True) if reason is None]
    failed = [Outcome(cell=cell, status="failed", error=why) for cell, why in zip(cells, reasons, strict=True) if why]
    return ready, failed


def write_failures(results: Path, experiment: str, orphans: Sequence[Outcome]) -> None:
    """Write the results of cells that cannot start: the reason is kept, and is seen in every table."""
    for outcome in orphans:
        folder = RunFolder.of(results, outcome.cell.id)
        folder.write_cell(outcome.cell.to_dict(experiment))
        folder.write_result(build_failed_result(folder.read_cell(), outcome.error or ""))
