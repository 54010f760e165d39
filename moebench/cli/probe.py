"""`moebench probe`: what the experts of a finished run have learned."""

from dataclasses import replace
from typing import Annotated

import typer

from moebench.analysis.pretrained.options import PretrainedOptions
from moebench.cli.options import DEFAULT_RESULTS, Json, Overrides, Plugins, Results, check_plot
from moebench.cli.output import print_report
from moebench.cli.probe_sections.options import (
    DEFAULTS,
    Arm,
    BatchSize,
    Data,
    Dtype,
    Label,
    Layer,
    Permutations,
    Plot,
    SequenceLength,
    Show,
    Subject,
    Tokens,
)
from moebench.cli.probe_sections.table import (
    DEFAULT_PROBE_TOKENS,
    NOUNS,
    PRETRAINED_PREFIX,
    ProbeRequest,
    SubjectKind,
    build_section,
    join_reports,
    parse_sections,
)
from moebench.cli.subjects import SUFFIXES
from moebench.errors import UsageError
from moebench.experiment.files import list_experiments


def probe(
    subject: Subject,
    overrides: Overrides = None,
    show: Show = "labels",
    label: Label = None,
    layer: Layer = None,
    arm: Arm = None,
    tokens: Tokens = DEFAULT_PROBE_TOKENS,
    permutations: Permutations = 100,
    data: Data = None,
    dtype: Dtype = DEFAULTS.dtype,
    batch_size: BatchSize = DEFAULTS.batch_size,
    sequence_length: SequenceLength = DEFAULTS.sequence_length,
    results: Results = DEFAULT_RESULTS,
    plugin: Plugins = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    plot: Plot = None,
    json: Json = False,
) -> None:
    """Show what experts have learned: which expert takes tokens with which label, on the test split.

    Information I(label; expert) is in bits, corrected for the bias of a finite sample, and compared with permuted
    labels and the untrained model. The runs of an experiment are pooled by arm, with intervals over seeds.
    """
    check_plot(plot)
    pretrained = PretrainedOptions(
        data=data, dtype=dtype, batch_size=batch_size, sequence_length=sequence_length, max_tokens=tokens
    )
    request = ProbeRequest(
        subject=subject,
        kind=_select_kind(subject),
        results=results,
        label=label,
        layer=layer,
        plot=plot,
        plugins=tuple(plugin or ()),
        overrides=tuple(overrides or ()),
        arm=arm,
        max_tokens=tokens,
        num_permutations=permutations,
        pretrained=pretrained,
    )
    _check_options(request)
    sections = parse_sections(show, request.kind)
    if plot and len(sections) > 1:
        raise UsageError(f"--plot {plot}: draws one section, and --show names {len(sections)}")
    reports = {section: build_section(request, section) for section in sections}
    print_report(join_reports(reports, _describe_subject(request)), json=json, markdown=markdown)


def _select_kind(subject: str) -> SubjectKind:
    if subject.startswith(PRETRAINED_PREFIX):
        return "pretrained"
    is_experiment = subject.endswith(SUFFIXES) or "/" in subject or subject in list_experiments()
    return "experiment" if is_experiment else "run"


def _check_options(request: ProbeRequest) -> None:
    """Raise UsageError for an option that does not apply to the kind of subject."""
    noun = NOUNS[request.kind]
    for option, value in (("KEY=VALUE", request.overrides), ("--arm", request.arm)):
        if value and request.kind != "experiment":
            raise UsageError(f"{option}: applies to an experiment, and the subject is {noun}")
    if request.kind != "pretrained" and request.pretrained != replace(DEFAULTS, max_tokens=request.max_tokens):
        raise UsageError(
            f"--data, --dtype, --batch-size, --sequence-length: apply to hf:PATH, and the subject is {noun}"
        )


def _describe_subject(request: ProbeRequest) -> dict[str, object]:
    """Return the first values of the JSON."""
    if request.kind != "run":
        return {"subject": request.subject}
    from moebench.runs.find_run import find_run

    cell = find_run(request.results, request.subject).read_cell()
    return {name: cell[name] for name in ("id", "arm", "seed")}
