"""The pooled information of an experiment as tables."""

from collections.abc import Sequence
from functools import partial

from moebench.analysis.specialisation.across_seeds import Contrast, PooledInformation, SeedMean
from moebench.reporting.formatting import MISSING, format_number, format_signed, format_with_interval
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

NOTES = (
    "bits: I(label; expert), without the bias of a finite sample, mean over seeds; ±: 95 % for all rows of a table"
    " together (Bonferroni over t intervals; needs three seeds);",
    "of routing: I / I(token; expert), 1 if the label determines the experts; given token: I(label; expert | token id);"
    " untrained: the same models before training, seed by seed;",
    "more, less: the interval of the difference excludes 0; undecided: it does not (docs/probing.md)",
)


def build_pooled_report(pooled: PooledInformation, layer: str | None = None) -> Report:
    """Return the tables of all arms: by label and layer, and for text by neighbour and by depth."""
    seeds = ", ".join(f"{arm}: {len(numbers)} seeds" for arm, numbers in pooled.seeds.items())
    rows = [row for row in pooled.rows if layer in (None, row.layer)]
    has_given = any(row.given_token is not None for row in rows)
    headers = ("bits", "of routing", *(("given token",) * has_given), "minus untrained")
    information = Table(
        title=f"{pooled.experiment}: what experts say about labels ({seeds})",
        columns=(
            *(Column(header=header, align="left", is_key=True) for header in ("arm", "label", "layer")),
            *(Column(header=header) for header in headers),
            Column(header="than untrained", align="left"),
        ),
        rows=tuple(
            (
                row.arm,
                row.kind,
                row.layer,
                format_mean(row.trained),
                format_number(row.of_routing.mean, decimals=3),
                *((format_mean(row.given_token),) * has_given),
                format_mean(row.minus_untrained, signed=True),
                format_verdict(row.minus_untrained),
            )
            for row in rows
        ),
        notes=pooled.notes,
    )
    depth = _build_contrast_table("By depth: the last layer minus the first", pooled.depth)
    neighbours = _build_contrast_table("Which token: one label minus another", pooled.neighbours)
    tables = [information, *(table for table in (depth, neighbours) if table.rows)]
    return Report(tables=tuple(tables), notes=NOTES, values=pooled.to_dict())


def _build_contrast_table(title: str, contrasts: Sequence[Contrast]) -> Table:
    return Table(
        title=title,
        columns=(
            Column(header="arm", align="left", is_key=True),
            Column(header="difference", align="left", is_key=True),
            Column(header="bits"),
            Column(header="verdict", align="left"),
        ),
        rows=tuple(
            (part.arm, part.name, format_mean(part.difference, signed=True), format_verdict(part.difference))
            for part in contrasts
        ),
    )


def format_mean(value: SeedMean | None, *, signed: bool = False) -> str:
    """Return a mean over seeds with half of its interval."""
    if value is None:
        return MISSING
    form = partial(format_signed if signed else format_number, decimals=4)
    return format_with_interval(value.mean, value.interval, form)


def format_verdict(difference: SeedMean) -> str:
    """Return what the interval of a difference says."""
    if not any(difference.values):
        return "equal"
    return {1: "more", -1: "less", 0: "undecided"}[difference.sign]
