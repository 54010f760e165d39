"""Specialisation: how often each expert takes tokens of each label, counted over an evaluation set."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.ranks import Ranks, sum_together
from moebench.routing.layer_name import LayerName
from moebench.routing.metrics import label_information
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch, LabelKind

MAX_STORED_LABELS = 1024
"""Kinds with more labels are measured, but their tables are not written."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTable:
    """Assignments by label and expert, for one kind of label, layer by layer."""

    values: tuple[str, ...]
    """Names of the labels."""
    layers: dict[str, Tensor]
    """MoE layer -> assignments of tokens of each label to each expert, fp64 [labels, E]."""

    @property
    def information(self) -> dict[str, float]:
        """MoE layer -> I(label; expert) / H(label); without layers where all tokens have one label."""
        by_layer = {layer: label_information(table_YE) for layer, table_YE in self.layers.items()}
        return {layer: value for layer, value in by_layer.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the table as values for JSON."""
        return {
            "values": list(self.values),
            "information": self.information,
            "layers": {layer: table_YE.tolist() for layer, table_YE in self.layers.items()},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LabelTable":
        """Rebuild a table from `to_dict`; raise ValueError for a table of another shape than its labels."""
        layers = {layer: torch.tensor(rows, dtype=torch.float64) for layer, rows in values["layers"].items()}
        if any(table.dim() != 2 or len(table) != len(values["values"]) for table in layers.values()):
            raise ValueError("a table has another number of rows than there are labels")
        return cls(values=tuple(values["values"]), layers=layers)


class LabelCounts:
    """Sums of the tables of all kinds of labels over the batches of an evaluation, on the device of the batches."""

    def __init__(self, kinds: Sequence[LabelKind]) -> None:
        self.kinds = [kind for kind in kinds if len(kind.values) > 1]
        self.tables: dict[LayerName, Tensor] = {}
        """MoE layer -> the tables of all kinds, concatenated: one all-reduce sums them over processes."""

    def add(self, batch: Batch, records: Sequence[LayerRecord]) -> None:
        """Count the assignments of a batch; padding has no assignments, so its labels do not matter."""
        labels: dict[bool, list[Tensor]] = {}
        for record in records if self.kinds else ():
            in_decoder = record.layer.half == "decoder"
            if in_decoder not in labels:
                labels[in_decoder] = self._labels(batch.decoder_batch if in_decoder else batch, record)
            pairs = zip(self.kinds, labels[in_decoder], strict=True)
            table = torch.cat([record.routing.tabulate_labels(label_T, len(kind.values)) for kind, label_T in pairs])
            self.tables[record.layer] = self.tables[record.layer] + table if record.layer in self.tables else table

    def _labels(self, batch: Batch, record: LayerRecord) -> list[Tensor]:
        """Return the label of each position, for every kind."""
        assert record.sequence_length is not None
        shape = len(batch.domain_B), record.sequence_length
        return [kind.read(batch).expand(shape).reshape(-1) for kind in self.kinds]

    def sum_over(self, ranks: Ranks) -> dict[str, LabelTable]:
        """Return the table of each kind, summed over processes; kinds with a single label are left out."""
        sizes = [len(kind.values) for kind in self.kinds]
        summed = zip(self.tables, sum_together([*self.tables.values()], ranks), strict=True)
        parts = {str(layer): torch.split(table.cpu(), sizes) for layer, table in summed}
        tables = {
            kind.name: LabelTable(values=kind.values, layers={layer: split[index] for layer, split in parts.items()})
            for index, kind in enumerate(self.kinds)
        }
        return {name: table for name, table in tables.items() if table.information}


def summarise_information(tables: Mapping[str, LabelTable]) -> dict[str, float]:
    """Return the metric load/information/KIND of each kind of label, mean over layers."""
    by_kind = {name: table.information for name, table in tables.items()}
    return {f"load/information/{name}": sum(values.values()) / len(values) for name, values in by_kind.items()}


def label_tables_to_json(step: int, tables: Mapping[str, LabelTable]) -> str:
    """Return the content of labels.json: the tables of a finished run on its test split."""
    kinds = {name: table.to_dict() for name, table in tables.items() if len(table.values) <= MAX_STORED_LABELS}
    return json.dumps({"step": step, "split": "test", "kinds": kinds}, ensure_ascii=False) + "\n"


def read_label_tables(file: Path) -> dict[str, LabelTable]:
    """Read the tables of a finished run by kind; raise UsageError when the file is missing or damaged."""
    try:
        kinds = json.loads(read_plain_file(file))["kinds"]
        tables = {str(name): LabelTable.from_dict(table) for name, table in kinds.items()}
        if not all(table.information for table in tables.values()):
            raise ValueError("a table without information, which no run writes")
        return tables
    except FileNotFoundError as error:
        raise UsageError(f"{file}: does not exist; a run has it when it is done and has experts") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise UsageError(f"{file}: cannot be read ({reason}); train the cell again") from error
