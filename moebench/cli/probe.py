"""`moebench probe`: what the experts of a finished run have learned."""

from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Plugins, Results, check_plot
from moebench.cli.output import print_report
from moebench.cli.probe_sections.table import (
    DEFAULT_PROBE_TOKENS,
    PRETRAINED_PREFIX,
    SECTIONS,
    ProbeRequest,
    SubjectKind,
    build_section,
    join_reports,
    parse_sections,
)
from moebench.errors import UsageError

MEANINGS = "; ".join(f"{name}: {section.meaning}" for name, section in SECTIONS.items())


def probe(
    subject: Annotated[
        str,
        typer.Argument(metavar="RUN", help="The id of a finished run, or a prefix of it (list runs)."),
    ],
    show: Annotated[str, typer.Option(metavar="SECTION,...", help=f"{MEANINGS}.")] = "labels",
    label: Annotated[
        str | None, typer.Option(help="One kind of label: domain, class, position ... Default: all.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="The layer in the tables. Default: the one with the most information.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Positions of the validation split for history, agreement and ablations.")
    ] = DEFAULT_PROBE_TOKENS,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the section (PNG, PDF, SVG).")] = None,
    json: Json = False,
) -> None:
    """Show which expert takes tokens of which label - domain, class, position, kind of token - on the test split.

    The number of a layer is I(label; expert) / H(label): 1 if the expert determines the label, 0 if it is
    independent of it. --json has the whole tables, assignments of each label to each expert, for every layer.
    """
    check_plot(plot)
    kind = _select_kind(subject)
    sections = parse_sections(show, kind)
    if plot and len(sections) > 1:
        raise UsageError(f"--plot {plot}: draws one section, and --show names {len(sections)}")
    requests = [
        ProbeRequest(
            subject=subject,
            kind=kind,
            section=section,
            results=results,
            label=label,
            layer=layer,
            plot=plot,
            plugins=tuple(plugin or ()),
            tokens=tokens,
        )
        for section in sections
    ]
    reports = {request.section: build_section(request) for request in requests}
    report = join_reports(reports, _describe_subject(subject, kind, results))
    print_report(report, json=json, markdown=markdown)


def _select_kind(subject: str) -> SubjectKind:
    return "pretrained" if subject.startswith(PRETRAINED_PREFIX) else "run"


def _describe_subject(subject: str, kind: SubjectKind, results: Path) -> dict[str, object]:
    """Return the first values of the JSON."""
    if kind != "run":
        return {"subject": subject}
    from moebench.analysis.specialisation.report import find_run

    cell = find_run(results, subject).read_cell()
    return {name: cell[name] for name in ("id", "arm", "seed")}
