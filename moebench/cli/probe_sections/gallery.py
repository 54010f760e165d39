"""Section `gallery` of a run on images or recordings: the patches or sounds of each expert."""

from moebench.analysis.specialisation.gallery import build_gallery_report
from moebench.analysis.trained_run import open_routed_run
from moebench.cli.probe_sections.table import ProbeRequest
from moebench.errors import UsageError
from moebench.reporting.report import Report


def build_report(request: ProbeRequest) -> Report:
    """Draw the gallery and return what it shows as a table."""
    if request.plot is None:
        raise UsageError("--show gallery: draws a figure; name its file (--plot FILE.png, .pdf or .svg)")
    run = open_routed_run(request.results, request.subject, request.plugins, "gallery", allows_mixture=True)
    return build_gallery_report(run, request.layer, request.max_tokens, request.plot)
