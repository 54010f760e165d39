"""What a run writes while it trains: its journal, and what its experts did beside it."""

import json
from collections.abc import Mapping

from moebench.runs.folder import RunFolder, write_atomically
from moebench.runs.journal import Journal
from moebench.training.label_tables import LabelTable, label_tables_to_json


class RunRecorder(Journal):
    """The journal of a run, a line of expert loads for each evaluation, and in the end who takes which label."""

    def __init__(self, folder: RunFolder) -> None:
        super().__init__(folder.journal)
        self.loads = folder.loads
        self.labels = folder.labels

    def record_load(self, step: int, layers: dict[str, list[int]]) -> None:
        """Add the loads of one evaluation: MoE layer -> assignments of each expert."""
        with self.loads.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "layers": layers}) + "\n")

    def record_labels(self, step: int, tables: Mapping[str, LabelTable]) -> None:
        """Write which expert takes which label, whole or not at all."""
        write_atomically(self.labels, label_tables_to_json(step, tables))

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
