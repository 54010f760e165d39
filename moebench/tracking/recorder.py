"""What a run writes while it trains: its journal, and the load of every expert beside it."""

import json
from pathlib import Path

from moebench.tracking.journal import Journal


class RunRecorder(Journal):
    """The journal of a run, and a second file with a line of expert loads for each evaluation."""

    def __init__(self, journal: Path, loads: Path) -> None:
        super().__init__(journal)
        self.loads = loads

    def record_load(self, step: int, layers: dict[str, list[int]]) -> None:
        """Add the loads of one evaluation: MoE layer -> assignments of each expert."""
        with self.loads.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")

    def truncate_after(self, step: int) -> None:
        """Drop the points and loads beyond a checkpointed step."""
        super().truncate_after(step)
        if not self.loads.exists():
            return
        lines = self.loads.read_text(encoding="utf-8").splitlines(keepends=True)
        # A torn last line is behind the checkpoint: the journal is flushed before a checkpoint claims its steps.
        whole = [line for line in lines if line.endswith("\n")]
        fresh = self.loads.with_name(self.loads.name + ".tmp")
        fresh.write_text("".join(line for line in whole if json.loads(line)["step"] <= step), encoding="utf-8")
        fresh.replace(self.loads)
