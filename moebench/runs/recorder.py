"""The record that a run writes while it trains: journal, series of layers, expert loads, labels."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from moebench.errors import UsageError
from moebench.file_access import open_to_write, read_plain_file
from moebench.parallel.manifest import RecordPrefix
from moebench.printable import print_text
from moebench.runs.append_only_file import AppendOnlyFile
from moebench.runs.checked_json import add_checksum
from moebench.runs.folder import RunFolder, write_atomically, write_json
from moebench.runs.journal import Journal, read_journal
from moebench.runs.layer_series import LayerValues, format_layer_line, parse_layer_line, read_thinned_series


class RunRecorder:
    """Write journal and series of layers of a run, the expert loads of each evaluation and, at the end, the labels.

    All processes of a run have the same metrics, so only rank 0 records them: without a folder nothing is written.
    """

    def __init__(self, folder: RunFolder | None) -> None:
        self.folder = folder
        self.journal = Journal(folder.journal) if folder else None
        self._layers = AppendOnlyFile(folder.layers) if folder and folder.layers.exists() else None

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
            with os.fdopen(open_to_write(self.folder.loads), "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, "layers": layers}) + "\n")
                file.flush()
                os.fsync(file.fileno())  # before a checkpoint claims the step

    def record_layers(self, step: int, layers: Mapping[str, LayerValues]) -> None:
        """Add the values of all MoE layers at a logged step."""
        if self.folder:
            self._layers = self._layers or AppendOnlyFile(self.folder.layers)
            self._layers.append_line(format_layer_line(step, layers))

    def record_labels(self, text: str) -> None:
        """Write the label tables of the trained model, JSON from `training.label_tables`, atomically."""
        if self.folder:
            write_atomically(self.folder.labels, text)

    def record_init(self, values: Mapping[str, Any]) -> None:
        """Write what the model has taken from its parent, JSON-ready values, atomically."""
        if self.folder:
            write_json(self.folder.init, add_checksum(values))

    def flush(self) -> None:
        """Block until every point is on the disk."""
        for file in (self.journal, self._layers):
            if file:
                file.flush()

    def describe(self) -> dict[str, dict[str, int | str]]:
        """Return number and SHA-256 (hex) of the bytes of each file that grows, for the manifest of a checkpoint."""
        if not (self.journal and self.folder):
            return {}
        summaries = {file.path.name: file.summary for file in (self.journal, self._layers) if file}
        if self.folder.loads.exists():
            content = read_plain_file(self.folder.loads, None)
            summaries[self.folder.loads.name] = _summarise(content)
        return summaries

    def find_missing(self, records: Mapping[str, RecordPrefix]) -> str | None:
        """Return which file no longer begins as it was when a checkpoint was written, or None."""
        return find_missing(self.folder, records) if self.folder else None

    def rewind(self, step: int, records: Mapping[str, RecordPrefix]) -> None:
        """Drop what was recorded after a checkpoint, and the labels: a resumed run repeats it."""
        if not (self.journal and self.folder):
            return
        journal, loads = (records.get(path.name) for path in (self.folder.journal, self.folder.loads))
        if journal:
            self.journal.truncate_to(journal.bytes)
        else:
            self.journal.truncate_after(step)
        self._rewind_layers(step, records)
        if not self.folder.loads.exists():
            return
        if loads or records or step == 0:
            _replace(self.folder.loads, read_plain_file(self.folder.loads, None)[: loads.bytes if loads else 0])
        else:
            _replace(self.folder.loads, b"".join(_select_loads(self.folder.loads, step)))

    def _rewind_layers(self, step: int, records: Mapping[str, RecordPrefix]) -> None:
        """Drop the series of layers after a checkpoint; of one that does not know them, all or the later steps."""
        if self._layers is None:
            return
        prefix = records.get(self._layers.path.name)
        if prefix or records or step == 0:
            self._layers.truncate_to(prefix.bytes if prefix else 0)
        else:
            self._layers.keep_lines(lambda line: parse_layer_line(line).step <= step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self.journal:
                self.journal.__exit__(kind, error, trace)
        finally:
            if self._layers:
                self._layers.__exit__(kind, error, trace)


def find_missing(folder: RunFolder, records: Mapping[str, RecordPrefix]) -> str | None:
    """Return which file of a run no longer begins as it was when a checkpoint was written, or None.

    Without `records`, of an earlier version, the files must be readable.
    """
    if not records:
        try:
            read_journal(folder.journal)
            read_loads(folder.loads)
            read_thinned_series(folder.layers)
        except UsageError as error:
            return str(error)
    for name, expected in records.items():
        path = folder.path / Path(name).name
        content = read_plain_file(path, None) if path.exists() else b""
        if _summarise(content[: expected.bytes]) != asdict(expected):
            return f"{name} does not have what it had when the checkpoint was written"
    return None


def read_loads(file: Path) -> dict[int, dict[str, list[int]]]:
    """Return step -> MoE layer -> assignments of each expert; raise UsageError if the file is damaged."""
    try:
        lines = [json.loads(line) for line in read_plain_file(file, None).splitlines()] if file.exists() else []
        return {
            int(line["step"]): {str(layer): list(map(int, load)) for layer, load in line["layers"].items()}
            for line in lines
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
        raise UsageError(f"{file}: not a record of load ({error})") from error


def _summarise(content: bytes) -> dict[str, int | str]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _select_loads(file: Path, step: int) -> Iterator[bytes]:
    """Yield the complete lines up to a step; a damaged one costs a figure, not the run."""
    for line in read_plain_file(file, None).splitlines(keepends=True):
        try:
            # A torn last line is later than the checkpoint: the journal is flushed before it is written.
            if line.endswith(b"\n") and int(json.loads(line)["step"]) <= step:
                yield line
        except (ValueError, TypeError, KeyError, RecursionError):
            print_text(f"load.jsonl: a damaged line was dropped: {line[:80]!r}")


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.unlink(missing_ok=True)
    with temporary.open("xb") as handle:  # a new file, not one that a link with this name chooses
        handle.write(content)
    temporary.replace(file)
