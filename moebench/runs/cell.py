"""A cell: one grid point, that is one training run."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moebench.config import to_plain
from moebench.routing.router import ROUTERS
from moebench.runs.environment import describe_version
from moebench.schema import CellConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One training run of an experiment, done or not."""

    id: str
    arm: str
    seed: int
    config: CellConfig
    varies: Mapping[str, Any]
    """The configuration keys in which cells of the experiment differ, with this cell's values."""
    plugins: tuple[str, ...]
    """Plugin files that must be loaded before the cell can be built."""
    data_digest: str
    """Digest of the data source, as it entered the id."""
    plugin_digests: tuple[str, ...] = ()
    """Digests of the plugins, as they entered the id."""
    stage: str = ""
    """The stage of the experiment that it belongs to; empty without stages."""
    parents: tuple["Cell", ...] = ()
    """Runs of earlier stages that its weights start from; `init.from` of its configuration names them."""

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
            "plugin_digests": list(self.plugin_digests),
            "family": ROUTERS.get(self.config.router.name).facts.family,
            "version": describe_version(),
            "data": {"name": self.config.task.name, "digest": self.data_digest},
        }
