"""Section `compute` of a run: experts per token, and whether difficult tokens use more of them."""

from moebench.analysis.stored_run import StoredRun
from moebench.analysis.token_compute.measure import measure_tokens
from moebench.analysis.token_compute.report import build_report as build_token_report
from moebench.analysis.token_compute.report import draw_report
from moebench.analysis.token_compute.runs import find_pairs
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError
from moebench.reporting.report import Report
from moebench.routing.router import ROUTERS


def build_report(request: ProbeRequest) -> Report:
    """Return the section; one line for an arm whose tokens all use the same number of experts."""
    pairs = find_pairs(request.results, request.subject, request.plugins)
    run = pairs[0].run
    reason = _explain_constant(run)
    if reason:
        if request.plot:
            raise UsageError(f"--plot {request.plot}: {reason}")
        return Report(tables=(), notes=(f"compute: {reason}.",), values={"constant": reason})
    tables = {pair.run.seed: measure_tokens(pair, request.results, request.max_tokens) for pair in pairs}
    if request.plot:
        draw_report(run.arm, run.seed, tables[run.seed], request.plot)
    return build_token_report(run.arm, tables)


def _explain_constant(run: StoredRun) -> str:
    """Return why no token uses more experts than another; empty where some may."""
    entry = ROUTERS.get(run.config.router.name)
    if entry.item.form.is_dense:
        return f"{run.arm} is dense"
    if entry.item.form.is_mixture:
        return f"the router '{run.config.router.name}' mixes tokens, so no token has its own experts"
    drops = run.config.layout.capacity_factor_eval is not None
    if not entry.facts.variable_k and not drops:
        return f"every token of {run.arm} uses the same number of experts"
    return ""
