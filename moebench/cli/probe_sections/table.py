"""The table of sections: which module shows what, for which kind of subject."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moebench.analysis.pretrained.options import PretrainedOptions
from moebench.commands import DEFAULT_RESULTS
from moebench.errors import UsageError, build_unknown_error

if TYPE_CHECKING:
    from moebench.reporting.report import Report

SubjectKind = Literal["run", "experiment", "pretrained"]
DEFAULT_PROBE_TOKENS = 32_768
PRETRAINED_PREFIX = "hf:"
"""What a subject that is a folder of a transformers checkpoint begins with."""
NOUNS: Mapping[SubjectKind, str] = {
    "run": "a run",
    "experiment": "an experiment",
    "pretrained": f"a checkpoint ({PRETRAINED_PREFIX}PATH)",
}


@dataclass(frozen=True, kw_only=True)
class ProbeRequest:
    """What the sections of a report are asked for."""

    subject: str
    """The id of a run or a prefix of it, an experiment, or hf:PATH."""
    kind: SubjectKind
    results: Path = DEFAULT_RESULTS
    label: str | None = None
    """The only kind of label to show."""
    layer: str | None = None
    """The only layer to show."""
    plot: Path | None = None
    """File of the section's figure."""
    plugins: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    """Changes to an experiment, as on the command line of `moebench run`."""
    arm: str | None = None
    """The only arm of an experiment."""
    max_tokens: int = DEFAULT_PROBE_TOKENS
    """Positions, about, where the section runs the model."""
    num_permutations: int = 100
    """Permutations of the labels; 0: only what the run has stored."""
    pretrained: PretrainedOptions = field(default_factory=PretrainedOptions)
    """How a model of transformers is read."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """One section of the report."""

    meaning: str
    """For the help of `--show`."""
    modules: Mapping[SubjectKind, str]
    """Kind of subject -> module of this package whose `build_report(request)` returns the section's Report."""


SECTIONS: Mapping[str, Section] = {
    "labels": Section(
        meaning="information between experts and labels",
        modules={"run": "labels", "experiment": "pooled_labels", "pretrained": "pretrained_labels"},
    ),
    "contexts": Section(
        meaning="the tokens with the highest gate values of each expert, in text",
        modules={"run": "contexts", "pretrained": "pretrained_contexts"},
    ),
    "gallery": Section(meaning="the patches or sounds of each expert, as a figure", modules={"run": "gallery"}),
    "loads": Section(
        meaning="load and co-activation of experts (hf:PATH only)", modules={"pretrained": "pretrained_loads"}
    ),
    "history": Section(
        meaning="churn and saturation of routing, similarity and co-activation of experts, at train.keep_checkpoints",
        modules={"run": "history"},
    ),
    "agreement": Section(
        meaning="whether experts of other seeds of the arm are the same, after matching", modules={"run": "agreement"}
    ),
    "ablations": Section(
        meaning="how the loss changes when an expert is left out or a router is shuffled, random or of an earlier step",
        modules={"run": "ablations"},
    ),
    "compute": Section(meaning="experts per token and difficulty", modules={"run": "compute"}),
}


def parse_sections(text: str, kind: SubjectKind) -> list[str]:
    """Return the sections that `--show` names; raise UsageError for one that is unknown, twice, or not of the kind."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in SECTIONS:
            raise build_unknown_error("--show", name, SECTIONS)
        if kind not in SECTIONS[name].modules:
            allowed = [other for other, section in SECTIONS.items() if kind in section.modules]
            raise UsageError(f"--show {name}: does not apply to {NOUNS[kind]} (allowed: {', '.join(allowed)})")
    if len(set(names)) < len(names):
        raise UsageError(f"--show {text}: names a section twice")
    return names


def build_section(request: ProbeRequest, section: str) -> "Report":
    """Return the report of one section."""
    module = importlib.import_module(f"{__package__}.{SECTIONS[section].modules[request.kind]}")
    report: Report = module.build_report(request)
    return report


def join_reports(reports: Mapping[str, "Report"], heading: Mapping[str, object]) -> "Report":
    """Return one report of all sections; the JSON has the values of each below its name, after the heading."""
    from moebench.reporting.report import Report

    def chain(parts: Sequence[Sequence[str]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(line for lines in parts for line in lines))

    every = list(reports.values())
    return Report(
        tables=tuple(table for report in every for table in report.tables),
        heading=chain([report.heading for report in every]),
        caveats=chain([report.caveats for report in every]),
        problems=chain([report.problems for report in every]),
        notes=chain([report.notes for report in every]),
        values={**heading, **{name: report.values for name, report in reports.items()}},
    )
