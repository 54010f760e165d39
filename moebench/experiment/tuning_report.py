"""What one call of `run` has done in the tuning phase."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moebench.experiment.tuning import TuningState
from moebench.launch.scheduler import Outcome
from moebench.runs.result import Fault


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """Summary of the tuning runs of one call of `run`."""

    state: TuningState
    outcomes: Sequence[Outcome]
    """Tuning runs of this call."""
    num_final_cells: int
    """Runs that are reported, of all arms."""

    @property
    def failed(self) -> list[Outcome]:
        """Tuning runs that failed for another reason than divergence, which is an outcome of the trial."""
        return [
            outcome
            for outcome in self.outcomes
            if outcome.status == "busy" or (outcome.status == "failed" and outcome.fault != Fault.DIVERGED)
        ]

    def list_lines(self) -> list[str]:
        """Return the lines for the end of a run: how far the tuning is, and each arm that can choose nothing."""
        lines = [f"tuning: {self.state.describe_progress()}"]
        return lines + [f"failed: {choice.arm}: {choice.failure}" for choice in self.state.failed]

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as JSON-ready values."""
        trained = [outcome.cell.id for outcome in self.outcomes if outcome.status == "done"]
        return self.state.to_dict() | {"trained": trained}
