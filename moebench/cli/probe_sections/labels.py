"""Section `labels` of a run: which expert takes tokens of which label."""

from moebench.analysis.specialisation.figures import draw_labels
from moebench.analysis.specialisation.report import build_label_tables, read_label_report
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import unknown
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return the tables of all kinds of labels, or of one; draw them where a figure is asked for."""
    report = read_label_report(request.results, request.subject, request.label)
    for table in report.tables.values() if request.layer is not None else ():
        if request.layer not in table.layers:
            raise unknown("--layer", str(request.layer), table.layers)
    if request.plot:
        draw_labels(report.tables, path=request.plot, title=f"Who takes what: {report.arm}, seed {report.seed}")
    return Report(tables=build_label_tables(report.tables, request.layer), values=report.to_dict()["labels"])
