"""Section `loads` of a model of transformers: load and co-activation of the experts of each layer."""

from moebench.analysis.pretrained.probe import probe_pretrained
from moebench.analysis.pretrained.report import build_load_table, describe_model, measure_loads, require_layer
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Return a table with a row for each layer."""
    if request.plot:
        raise UsageError(f"--plot {request.plot}: the section loads has no figure (allowed: labels)")
    probe = probe_pretrained(request.subject, request.pretrained, request.results / "cache")
    require_layer(probe, request.layer)
    loads = measure_loads(probe)
    table = build_load_table(loads, request.layer)
    return Report(tables=(table,), heading=describe_model(probe), values={"model": probe.to_dict(), "layers": loads})
