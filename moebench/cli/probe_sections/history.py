"""Section `history` of a run: how its routing came about, at its kept checkpoints."""

from moebench.analysis.dynamics.history import measure_history
from moebench.analysis.dynamics.history_report import build_history_report, draw_history
from moebench.analysis.trained_run import open_routed_run
from moebench.cli.output import print_progress
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return saturation, churn, similarity and co-activation of each layer and checkpoint."""
    run = open_routed_run(request.results, request.subject, request.plugins, "history")
    run.require_layer(request.layer)
    history = measure_history(run, request.max_tokens, print_progress("checkpoints read"))
    report = build_history_report(history, request.layer)
    if request.plot:
        draw_history(history, request.plot)
    return report
