"""Rewinds: going back to the last checkpoint after a spike, and leaving out the batches since then.

As in PaLM (arXiv:2204.02311, section 5.1), the batches left out are those from the checkpoint to the spike. Which ones
they are is written to a file before training goes back, so that a run that is killed and resumed makes the same steps.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.runs.folder import read_json, write_json
from moebench.training.spikes import Spike

MAX_REWINDS = 10
"""Largest number of rewinds of a run; if it still spikes, rewinding does not help."""
FILE = "rewinds.json"
"""In the folder of the checkpoints: a run on another mesh continues with both."""


class RewindRequest(Exception):  # noqa: N818 - not an error: training continues
    """The loss of a step is a spike: training goes back. Raised before the update, on all processes."""

    def __init__(self, spike: Spike) -> None:
        super().__init__(str(spike))
        self.spike = spike


@dataclass(frozen=True, kw_only=True)
class Rewind:
    """One rewind."""

    to_step: int
    """Step of the checkpoint; 0: the initial weights."""
    spike: Spike

    @property
    def num_batches(self) -> int:
        """Number of batches left out."""
        return self.spike.step - self.to_step

    def __str__(self) -> str:
        """Return the rewind in one line."""
        return f"{self.spike}; back to step {self.to_step}, {self.num_batches} batches are left out"


@dataclass(frozen=True)
class Rewinds:
    """All rewinds of a run, in order."""

    entries: tuple[Rewind, ...] = ()

    def batch_number(self, step: int) -> int:
        """Return the number of the batch that update `step` (from 0) is made with."""
        return step + sum(entry.num_batches for entry in self.entries if entry.to_step <= step)

    def after(self, spike: Spike, checkpoint_every: int) -> "Rewinds":
        """Return the rewinds with one more: to the last step before the spike at which a checkpoint was written.

        The step is computed, not looked up: it must not depend on which checkpoints are readable.
        """
        to_step = (spike.step - 1) // checkpoint_every * checkpoint_every
        return Rewinds((*self.entries, Rewind(to_step=to_step, spike=spike)))

    def metrics(self, step: int) -> dict[str, float]:
        """Return what the journal has at the step of a checkpoint: the spikes that led back to it."""
        values: dict[str, float] = {}
        for number, entry in enumerate(self.entries, start=1):
            if entry.to_step == step:
                spike = {name.removeprefix("spike/"): value for name, value in entry.spike.metrics.items()}
                spike |= {"from_step": float(entry.spike.step)}
                values |= {f"rewind/{number}/{name}": value for name, value in spike.items()}
        return values

    def to_records(self) -> list[dict[str, Any]]:
        """Return the spikes for the result."""
        return [entry.spike.to_dict("rewound") | {"to_step": entry.to_step} for entry in self.entries]

    def write(self, checkpoints: Path) -> None:
        """Write the rewinds atomically into the folder of the checkpoints."""
        write_json(checkpoints / FILE, {"rewinds": self.to_records()})

    @classmethod
    def read(cls, checkpoints: Path) -> "Rewinds":
        """Return the rewinds of a run; raise UsageError when the file is damaged."""
        file = checkpoints / FILE
        try:
            return cls.from_records(read_json(file)) if file.exists() else cls()
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"{file}: not a list of rewinds; delete the run's folder to train it again") from error

    @classmethod
    def from_records(cls, content: Mapping[str, Any]) -> "Rewinds":
        """Rebuild the rewinds from the content of the file."""
        entries = []
        for record in content["rewinds"]:
            values = dict(record)
            to_step = int(values.pop("to_step"))
            entries.append(Rewind(to_step=to_step, spike=Spike.from_dict(values)))
        return cls(tuple(entries))


NO_REWINDS = Rewinds()
