"""A cell: one grid point, that is one training run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebench.config import to_plain
from moebench.schema import CellConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid: a training run, wanted or done."""

    id: str
    arm: str
    seed: int
    config: CellConfig
    varies: Mapping[str, Any]
    """What tells this cell from the others: configuration key -> value."""
    plugins: tuple[str, ...]
    """Plugin files that must be loaded before it can be built: those that it needs, of all that were given."""
    data_digest: str
    """Of the data source, as it entered the id."""

    def to_dict(self, experiment: str) -> dict[str, Any]:
        """Return the cell as written to its run folder."""
        return {
            "id": self.id,
            "arm": self.arm,
            "seed": self.seed,
            "experiment": experiment,
            "config": to_plain(self.config),
            "varies": dict(self.varies),
            "plugins": list(self.plugins),
            "data": {"name": self.config.task.name, "digest": self.data_digest},
        }
