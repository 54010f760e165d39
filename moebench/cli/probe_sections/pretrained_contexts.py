"""Section `contexts` of a model of transformers: where each expert's gate is highest."""

from moebench.analysis.pretrained.contexts import build_pretrained_contexts
from moebench.analysis.pretrained.probe import probe_pretrained
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return a table of contexts for each expert of a layer, by default the last one."""
    if request.plot:
        raise UsageError(f"--plot {request.plot}: contexts are tables (allowed with --plot: labels)")
    probe = probe_pretrained(request.subject, request.pretrained, request.results / "cache")
    return build_pretrained_contexts(probe, request.layer)
