"""What the experts of one finished run specialise in, for reading: its tables of labels and experts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from moebench.analysis.specialisation.figures import telling_labels
from moebench.errors import UsageError, unknown
from moebench.routing.metrics import label_parts
from moebench.runs.folder import RunFolder
from moebench.training.label_tables import LabelTable, read_label_tables

MOST_EXPERTS = 3
"""Experts named for each label."""


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """The tables of a run, by kind of label."""

    id: str
    arm: str
    seed: int
    tables: dict[str, LabelTable]

    def to_dict(self) -> dict[str, Any]:
        """Return all counts as JSON-ready values."""
        labels = {name: table.to_dict() for name, table in self.tables.items()}
        return {"id": self.id, "arm": self.arm, "seed": self.seed, "labels": labels}


def read_label_report(results: Path, run: str, kind: str | None = None) -> LabelReport:
    """Return what a run left, of all kinds of labels or of one; raise UsageError for an unknown run or kind."""
    folder = find_run(results, run)
    cell, tables = folder.read_cell(), read_label_tables(folder.labels)
    if kind is not None:
        if kind not in tables:
            raise unknown("--label", kind, tables)
        tables = {kind: tables[kind]}
    return LabelReport(id=cell["id"], arm=cell["arm"], seed=cell["seed"], tables=tables)


def find_run(results: Path, run: str) -> RunFolder:
    """Return the folder of the run whose id begins with `run`; raise UsageError unless it is exactly one."""
    ids = [path.parent.name for path in sorted((results / "runs").glob("*/cell.json"))]
    if not ids:
        raise UsageError(f"{results}: holds no run (moebench run makes them; --results, MOEBENCH_RESULTS)")
    found = [run_id for run_id in ids if run and run_id.startswith(run)]
    if len(found) > 1:
        raise UsageError(f"run: '{run}' begins {len(found)} ids ({', '.join(found)}); give more of it")
    if not found:
        raise unknown("run", run, ids)
    return RunFolder.of(results, found[0])


def find_best_layer(table: LabelTable) -> str:
    """Return the layer whose experts know most of the label."""
    return max(table.information, key=table.information.__getitem__)


def build_label_rows(table: LabelTable, layer: str) -> list[tuple[str, str, str, str]]:
    """Return for each label its name, its share of all assignments and of the information, and who takes it most.

    The labels are those of which the layer knows most; the last row is all tokens, to compare with.
    """
    table_YE = table.layers[layer]
    part_Y, total = label_parts(table_YE), float(table_YE.sum())
    information = max(float(part_Y.sum()), 1e-300)
    rows = [
        (
            table.values[label],
            f"{100 * float(table_YE[label].sum()) / total:.1f} %",
            f"{100 * float(part_Y[label]) / information:.1f} %",
            _busiest(table_YE[label]),
        )
        for label in telling_labels([table_YE])
    ]
    return [*rows, ("all", "100.0 %", "100.0 %", _busiest(table_YE.sum(0)))]


def _busiest(load_E: Tensor) -> str:
    experts = load_E.argsort(descending=True, stable=True)[:MOST_EXPERTS].tolist()
    taken = [(expert, 100 * float(load_E[expert] / load_E.sum())) for expert in experts]
    return ", ".join(f"{expert}: {share:.0f} %" for expert, share in taken if share > 0)
