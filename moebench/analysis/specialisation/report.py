"""The specialisation of the experts of one finished run: its tables of labels and experts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from moebench.analysis.specialisation.figures import find_informative_labels
from moebench.errors import UsageError, build_unknown_error
from moebench.reporting.table import Column, Table
from moebench.routing.metrics import label_parts
from moebench.routing.router import ROUTERS
from moebench.runs.find_run import find_run
from moebench.runs.folder import RunFolder
from moebench.training.label_tables import LabelTable, read_label_tables

NUM_EXPERTS = 3
"""Experts named for each label."""
STORED = "stored by the run, of its whole test split"
PART_NOTE = (
    "of what is known: the label's part of I(label; expert) in the layer of the table, p(label) times the divergence of"
    " its experts from those of all tokens; parts add up to 100 % (docs/probing.md)"
)


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
    """Return the tables of a run, of all kinds of labels or of one; raise UsageError for an unknown run or kind."""
    folder = find_run(results, run)
    cell = folder.read_cell()
    if not folder.labels.exists():
        require_experts(folder, cell)
    tables = read_label_tables(folder.labels)
    folder.require_unchanged(folder.labels)
    if kind is not None:
        if kind not in tables:
            raise build_unknown_error("--label", kind, tables)
        tables = {kind: tables[kind]}
    return LabelReport(id=cell["id"], arm=cell["arm"], seed=cell["seed"], tables=tables)


def require_experts(folder: RunFolder, cell: Mapping[str, Any]) -> None:
    """Raise UsageError if the router of a run has no experts; passes where its plug-in is not loaded."""
    router = cell["config"].get("router")
    name = router.get("name") if isinstance(router, dict) else router
    if any(entry.name == name and entry.item.form.is_dense for entry in ROUTERS.entries()):
        raise UsageError(f"the router '{name}' of run {folder.path.name} has no experts to choose from")


def find_best_layer(table: LabelTable) -> str:
    """Return the layer whose experts have the most information about the label."""
    return max(table.information, key=table.information.__getitem__)


def build_label_tables(tables: Mapping[str, LabelTable], layer: str | None, origin: str = STORED) -> tuple[Table, ...]:
    """Return a table of each kind of label: the experts of each label in a layer, by default the most informed one.

    `origin`: for the legend, where the tables are from.
    """
    shown = [_build_label_table(kind, table, layer or find_best_layer(table)) for kind, table in tables.items()]
    if shown:
        legend = (f"I / H(label), not corrected: {origin}, normalised, with the bias of a finite sample;", PART_NOTE)
        shown[-1] = replace(shown[-1], notes=(*shown[-1].notes, *legend))
    return tuple(shown)


def _build_label_table(kind: str, table: LabelTable, layer: str) -> Table:
    rows, num_labels = build_label_rows(table, layer), int(table.layers[layer].any(1).sum())
    shown = f"{len(rows) - 1} of {num_labels} labels: those about which the layer has the most information"
    headers = ("share", "of what is known", f"experts of layer {layer}")
    return Table(
        title=f"{kind}, I / H(label), not corrected: "
        + ", ".join(f"layer {name} {value:.3f}" for name, value in table.information.items()),
        columns=(
            Column(header=kind, align="left", wraps=True),
            *(Column(header=header) for header in headers[:2]),
            Column(header=headers[2], align="left", wraps=True),
        ),
        rows=tuple(rows),
        notes=(shown,) * (len(rows) - 1 < num_labels),
    )


def build_label_rows(table: LabelTable, layer: str) -> list[tuple[str, str, str, str]]:
    """Return for each label its name, its shares of all assignments and of the information, and its main experts.

    The labels are the most informative ones of the layer; the last row, for comparison, is over all tokens.
    """
    table_YE = table.layers[layer]
    information_Y, total = label_parts(table_YE), float(table_YE.sum())
    information = max(float(information_Y.sum()), 1e-300)
    rows = [
        (
            table.values[label],
            f"{100 * float(table_YE[label].sum()) / total:.1f} %",
            f"{100 * float(information_Y[label]) / information:.1f} %",
            _format_main_experts(table_YE[label]),
        )
        for label in find_informative_labels([table_YE])
    ]
    return [*rows, ("all", "100.0 %", "100.0 %", _format_main_experts(table_YE.sum(0)))]


def _format_main_experts(load_E: Tensor) -> str:
    experts = load_E.argsort(descending=True, stable=True)[:NUM_EXPERTS].tolist()
    shares = [(expert, 100 * float(load_E[expert] / load_E.sum())) for expert in experts]
    return ", ".join(f"{expert}: {share:.0f} %" for expert, share in shares if share > 0)
