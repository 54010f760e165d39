"""Section `ablations` of a run: what its loss owes to each expert and to each router."""

from moebench.analysis.interventions.ablations import measure_ablations
from moebench.analysis.interventions.report import build_ablation_report, draw_ablations
from moebench.analysis.trained_run import open_routed_run
from moebench.cli.output import print_progress
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return the effects of every intervention, overall and by label."""
    run = open_routed_run(request.results, request.subject, request.plugins, "ablations", allows_mixture=True)
    run.require_layer(request.layer)
    result = measure_ablations(run, request.max_tokens, print_progress("interventions measured"), request.label)
    report = build_ablation_report(result, request.layer, request.label)
    if request.plot:
        draw_ablations(result, request.plot)
    return report
