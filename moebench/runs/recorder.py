"""The record that a run writes while it trains: journal, expert loads, labels."""

import json
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from moebench.runs.folder import RunFolder, write_atomically
from moebench.runs.journal import Journal, read_journal


class RunRecorder:
    """Write the journal of a run, the expert loads of each evaluation and, at the end, the labels of each expert.

    All processes of a run have the same metrics, so only rank 0 records them: without a folder nothing is written.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.journal = Journal(folder.journal) if folder else None

    def append(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add the metrics of one step to the journal."""
        if self.journal:
            self.journal.append(step, metrics)

    def append_missing(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add those of the metrics that the journal does not have at this step."""
        if self.journal and metrics:
            points, _ = read_journal(self.journal.path)
            present = {name for point in points if point.step == step for name in point.metrics}
            missing = {name: value for name, value in metrics.items() if name not in present}
            if missing:
                self.journal.append(step, missing)

    def record_load(self, step: int, layers: Mapping[str, list[int]]) -> None:
        """Add the loads of one evaluation: MoE layer -> assignments of each expert."""
        if self.folder:
            with self.folder.loads.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "layers": layers}) + "\n")

    def record_labels(self, text: str) -> None:
        """Write the label tables of the trained model, JSON from `training.label_tables`, atomically."""
        if self.folder:
            write_atomically(self.folder.labels, text)

    def flush(self) -> None:
        """Block until every point is on the disk."""
        if self.journal:
            self.journal.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the points and loads of later steps, which a resumed run repeats."""
        if self.journal and self.folder:
            self.journal.truncate_after(step)
            _truncate_loads(self.folder, step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.journal:
            self.journal.close()


def _truncate_loads(folder: RunFolder, step: int) -> None:
    if not folder.loads.exists():
        return
    lines = folder.loads.read_text(encoding="utf-8").splitlines(keepends=True)
    # A torn last line is later than the checkpoint: the journal is flushed before a checkpoint claims its steps.
    complete = [line for line in lines if line.endswith("\n")]
    temporary = folder.loads.with_name(folder.loads.name + ".tmp")
    temporary.write_text("".join(line for line in complete if json.loads(line)["step"] <= step), encoding="utf-8")
    temporary.replace(folder.loads)
