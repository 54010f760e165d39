"""Section `agreement` of a run: whether the other seeds of its arm have the same experts."""

from moebench.analysis.dynamics.seed_agreement import measure_agreement
from moebench.analysis.dynamics.seed_agreement_report import build_agreement_report, draw_agreement
from moebench.analysis.stored_run import find_other_seeds
from moebench.analysis.trained_run import TrainedRun, open_routed_run
from moebench.cli.output import print_progress
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return the agreement of each layer over all pairs of finished seeds."""
    run = open_routed_run(request.results, request.subject, request.plugins, "agreement")
    run.require_layer(request.layer)
    others = [TrainedRun.from_task(other, run.task) for other in find_other_seeds(run, request.results)]
    result = measure_agreement(run, others, request.max_tokens, print_progress("seeds routed"))
    report = build_agreement_report(result, request.layer)
    if request.plot:
        draw_agreement(result, request.plot)
    return report
