"""What experts specialise in: which of them takes tokens of which label, counted over an evaluation set."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.ranks import Ranks
from moebench.routing.layer_name import LayerName
from moebench.routing.metrics import label_information
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch, LabelKind

MAX_STORED_LABELS = 1024
"""Labels of a kind, beyond which its tables are not written: their number is measured all the same."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelTable:
    """Which expert takes which label of one kind, layer by layer."""

    values: tuple[str, ...]
    """What the labels stand for."""
    layers: dict[str, Tensor]
    """MoE layer -> assignments of tokens of each label to each expert, fp64 [labels, E]."""

    @property
    def information(self) -> dict[str, float]:
        """MoE layer -> I(label; expert) / H(label); empty where all tokens have one label."""
        found = {layer: label_information(table_YE) for layer, table_YE in self.layers.items()}
        return {layer: value for layer, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the table as JSON-ready values."""
        return {
            "values": list(self.values),
            "information": self.information,
            "layers": {layer: table_YE.tolist() for layer, table_YE in self.layers.items()},
        }


class LabelCounts:
    """Adds up the tables of all kinds over the batches of an evaluation, on the batches' device."""

    def __init__(self, kinds: Sequence[LabelKind]) -> None:
        self.kinds = [kind for kind in kinds if len(kind.values) > 1]
        self.tables: dict[LayerName, Tensor] = {}
        """MoE layer -> the tables of all kinds, one below the other: one exchange adds them up over processes."""

    def add(self, batch: Batch, records: Sequence[LayerRecord]) -> None:
        """Count what the layers did with a batch; padding is assigned to nobody, so whatever label it has is free."""
        read: dict[bool, list[Tensor]] = {}
        for record in records if self.kinds else ():
            in_decoder = record.layer.half == "decoder"
            if in_decoder not in read:
                read[in_decoder] = self._labels(batch.decoder_batch if in_decoder else batch, record)
            pairs = zip(self.kinds, read[in_decoder], strict=True)
            table = torch.cat([record.routing.tabulate_labels(label_T, len(kind.values)) for kind, label_T in pairs])
            self.tables[record.layer] = self.tables[record.layer] + table if record.layer in self.tables else table

    def _labels(self, batch: Batch, record: LayerRecord) -> list[Tensor]:
        assert record.sequence_length is not None
        shape = len(batch.domain_B), record.sequence_length
        return [kind.read(batch).expand(shape).reshape(-1) for kind in self.kinds]

    def over(self, ranks: Ranks) -> dict[str, LabelTable]:
        """Return the tables of each kind, of all processes together; kinds of which one label occurs are left out."""
        sizes = [len(kind.values) for kind in self.kinds]
        whole = {str(layer): torch.split(ranks.sum(table).cpu(), sizes) for layer, table in self.tables.items()}
        found = {
            kind.name: LabelTable(values=kind.values, layers={layer: parts[place] for layer, parts in whole.items()})
            for place, kind in enumerate(self.kinds)
        }
        return {name: table for name, table in found.items() if table.information}


def information(tables: Mapping[str, LabelTable]) -> dict[str, float]:
    """Return load/information/KIND of each kind of label, mean over the layers."""
    by_layer = {name: table.information for name, table in tables.items()}
    return {f"load/information/{name}": sum(found.values()) / len(found) for name, found in by_layer.items()}


def label_tables_to_json(step: int, tables: Mapping[str, LabelTable]) -> str:
    """Return the file of a finished run's tables, on its test split."""
    kept = {name: table.to_dict() for name, table in tables.items() if len(table.values) <= MAX_STORED_LABELS}
    return json.dumps({"step": step, "split": "test", "kinds": kept}, ensure_ascii=False) + "\n"


def read_label_tables(file: Path) -> dict[str, LabelTable]:
    """Return the tables of a finished run by their kind; raise UsageError when the file is missing or damaged."""
    try:
        return {name: _table(found) for name, found in json.loads(file.read_bytes())["kinds"].items()}
    except FileNotFoundError as error:
        raise UsageError(f"{file}: is not there; a run has it when it is done and has experts") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{file}: cannot be read ({type(error).__name__}); train the cell again") from error


def _table(found: Mapping[str, Any]) -> LabelTable:
    layers = {layer: torch.tensor(rows, dtype=torch.float64) for layer, rows in found["layers"].items()}
    if any(table.dim() != 2 or len(table) != len(found["values"]) for table in layers.values()):
        raise ValueError("a table has another number of rows than there are labels")
    return LabelTable(values=tuple(found["values"]), layers=layers)
