"""Section `labels` of a model of transformers: the report of a run, from its router modules."""

from dataclasses import replace

from moebench.analysis.pretrained.measure import measure_pretrained
from moebench.analysis.pretrained.probe import probe_pretrained
from moebench.analysis.pretrained.report import describe_model, require_layer, tabulate_labels
from moebench.analysis.specialisation.figures import draw_labels
from moebench.analysis.specialisation.information_report import build_information_table
from moebench.analysis.specialisation.measure import ProbeOptions
from moebench.analysis.specialisation.report import build_label_tables
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.reporting.report import Report

OF_RUN, OF_CHECKPOINT = "of the model before training", "of the same routers with weights drawn again"
"""What the control `untrained` is."""


def build_report(request: ProbeRequest) -> Report:
    """Return the information about all kinds of labels, or of one, and its tables; draw these for --plot."""
    probe = probe_pretrained(request.subject, request.pretrained, request.results / "cache")
    require_layer(probe, request.layer)
    options = ProbeOptions(num_permutations=request.num_permutations, label=request.label)
    measured = measure_pretrained(probe, options) if request.num_permutations else None
    tables = tabulate_labels(probe, request.label)
    if request.plot:
        draw_labels(tables, path=request.plot, title=f"Who takes what: {probe.folder.family.title}")
    informed = {name: table for name, table in tables.items() if table.information}
    shown = build_label_tables(informed, request.layer, "of the tokens of this probe")
    if measured is not None:
        information = build_information_table(measured, request.layer)
        title = f"What experts say about labels, in bits: {measured.num_tokens:,} tokens"
        notes = tuple(note.replace(OF_RUN, OF_CHECKPOINT) for note in information.notes)
        shown = (replace(information, title=title, notes=notes), *shown)
    values = {
        "model": probe.to_dict(),
        "tables": {name: table.to_dict() for name, table in tables.items()},
        "information": measured.to_dict() if measured else None,
    }
    return Report(tables=shown, heading=describe_model(probe), values=values)
