"""`moebench probe`: what the experts of a finished run have learned."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from moebench.cli.options import DEFAULT_RESULTS, Json, Overrides, Plugins, Results, check_plot
from moebench.cli.output import print_report
from moebench.cli.probe_sections.table import (
    NOUNS,
    PRETRAINED_PREFIX,
    SECTIONS,
    ProbeRequest,
    SubjectKind,
    build_section,
    join_reports,
    parse_sections,
)
from moebench.cli.subjects import SUFFIXES
from moebench.errors import UsageError
from moebench.experiment.files import list_experiments

MEANINGS = "; ".join(f"{name}: {section.meaning}" for name, section in SECTIONS.items())

Subject = Annotated[
    str, typer.Argument(metavar="RUN|EXPERIMENT", help="The id of a finished run, or a prefix of it; or an experiment.")
]


def probe(
    subject: Subject,
    overrides: Overrides = None,
    show: Annotated[str, typer.Option(metavar="SECTION,...", help=f"{MEANINGS}.")] = "labels",
    label: Annotated[
        str | None, typer.Option(help="One kind of label: domain, class, position, token_id ... Default: all.")
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="The only layer. Default: all, or the one with the most information.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="The only arm of an experiment. Default: all.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Positions of the test split, about.")] = ProbeRequest.max_tokens,
    permutations: Annotated[
        int, typer.Option(min=0, help="Permutations of the labels; 0: only the tables that the run has stored.")
    ] = ProbeRequest.num_permutations,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the section (PNG, PDF, SVG).")] = None,
    json: Json = False,
) -> None:
    """Show what experts have learned: which of them takes tokens of which label, on the test split.

    Information I(label; expert) is in bits, without the bias of a finite sample, beside permuted labels and the same
    model before training. Of an experiment, runs are pooled by arm, with intervals over seeds.
    """
    check_plot(plot)
    kind = _select_kind(subject)
    _check_options(kind, overrides, arm)
    sections = parse_sections(show, kind)
    if plot and len(sections) > 1:
        raise UsageError(f"--plot {plot}: draws one section, and --show names {len(sections)}")
    request = ProbeRequest(
        subject=subject,
        kind=kind,
        results=results,
        label=label,
        layer=layer,
        plot=plot,
        plugins=tuple(plugin or ()),
        overrides=tuple(overrides or ()),
        arm=arm,
        max_tokens=tokens,
        num_permutations=permutations,
    )
    reports = {section: build_section(replace(request, section=section)) for section in sections}
    report = join_reports(reports, _describe_subject(subject, kind, results))
    print_report(report, json=json, markdown=markdown)


def _select_kind(subject: str) -> SubjectKind:
    if subject.startswith(PRETRAINED_PREFIX):
        return "pretrained"
    is_experiment = subject.endswith(SUFFIXES) or "/" in subject or subject in list_experiments()
    return "experiment" if is_experiment else "run"


def _check_options(kind: SubjectKind, overrides: list[str] | None, arm: str | None) -> None:
    for option, value in (("KEY=VALUE", overrides), ("--arm", arm)):
        if value and kind != "experiment":
            raise UsageError(f"{option}: applies to an experiment, and the subject is {NOUNS[kind]}")


def _describe_subject(subject: str, kind: SubjectKind, results: Path) -> dict[str, object]:
    """Return the first values of the JSON."""
    if kind != "run":
        return {"subject": subject}
    from moebench.analysis.specialisation.report import find_run

    cell = find_run(results, subject).read_cell()
    return {name: cell[name] for name in ("id", "arm", "seed")}
