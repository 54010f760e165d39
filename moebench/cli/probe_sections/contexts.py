"""Section `contexts` of a run on text: where each expert's gate is highest."""

from moebench.analysis.specialisation.contexts import build_context_report
from moebench.analysis.trained_run import open_routed_run
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return a table of contexts for each expert."""
    if request.plot:
        raise UsageError("--plot: contexts are tables (allowed with --plot: labels, gallery)")
    run = open_routed_run(request.results, request.subject, request.plugins, "contexts", allows_mixture=True)
    return build_context_report(run, request.layer, request.max_tokens)
