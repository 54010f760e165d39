"""Section `labels` of a run: what experts say about labels, and which expert takes tokens of which label."""

from typing import Any

from moebench.analysis.specialisation.figures import draw_labels
from moebench.analysis.specialisation.information_report import build_information_table
from moebench.analysis.specialisation.measure import ProbeOptions, RunInformation, measure_run
from moebench.analysis.specialisation.report import LabelReport, build_label_tables, read_label_report
from moebench.analysis.trained_run import TrainedRun
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError, build_unknown_error
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return the information about all kinds of labels, or of one, with the stored tables; draw these for --plot.

    Without permutations, and for a model that cannot be evaluated, the report has the stored tables only.
    """
    stored = _read_stored(request)
    layers = next(iter(stored.tables.values())).layers if stored.tables else {}
    if request.layer is not None and layers and request.layer not in layers:
        raise build_unknown_error("--layer", request.layer, layers)
    if request.plot:
        draw_labels(stored.tables, path=request.plot, title=f"Who takes what: {stored.arm}, seed {stored.seed}")
    measured, problems = _measure(request, has_stored=bool(stored.tables))
    tables = build_label_tables(stored.tables, request.layer)
    if measured is not None:
        tables = (build_information_table(measured, request.layer), *tables)
    values: dict[str, Any] = {"tables": stored.to_dict()["labels"]}
    values["information"] = measured.to_dict() if measured else None
    return Report(tables=tables, problems=problems, values=values)


def _read_stored(request: ProbeRequest) -> LabelReport:
    """Return the tables of the run; none for a kind of label that only a probe measures."""
    report = read_label_report(request.results, request.subject)
    if request.label is None:
        return report
    if request.label not in report.tables and not request.num_permutations:
        raise build_unknown_error("--label", request.label, report.tables)
    tables = {kind: table for kind, table in report.tables.items() if kind == request.label}
    return LabelReport(id=report.id, arm=report.arm, seed=report.seed, tables=tables)


def _measure(request: ProbeRequest, *, has_stored: bool) -> tuple[RunInformation | None, tuple[str, ...]]:
    if not request.num_permutations:
        return None, ()
    options = ProbeOptions(
        max_tokens=request.max_tokens, num_permutations=request.num_permutations, label=request.label
    )
    try:
        run = TrainedRun.open(request.results, request.subject, request.plugins)
        return measure_run(run, options), ()
    except UsageError as error:
        if not has_stored:
            raise
        return None, (f"stored tables only, without controls: {error}",)
