"""The table and the figure of the agreement of seeds."""

from pathlib import Path

from moebench.analysis.dynamics.seed_agreement import NUM_PERMUTATIONS, SeedAgreement
from moebench.errors import build_unknown_error
from moebench.reporting.canvas import GREY, PALETTE, new_figure
from moebench.reporting.formatting import MISSING, format_number, format_plural
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

COLUMNS = ("agreement", "by chance", "corrected", "interval")


def build_agreement_report(result: SeedAgreement, layer: str | None = None) -> Report:
    """Return a row for each layer, or for one; raise UsageError for an unknown layer."""
    if layer is not None and layer not in result.layers:
        raise build_unknown_error("--layer", layer, result.layers)
    rows = [
        (
            name,
            f"{100 * value.agreement:.1f} %",
            f"{100 * value.chance:.1f} %",
            format_number(value.corrected, 3),
            MISSING if value.interval is None else " to ".join(format_number(bound, 3) for bound in value.interval),
            value.verdict,
        )
        for name, value in result.layers.items()
        if layer in (None, name)
    ]
    columns = (
        Column(header="layer", align="left", is_key=True),
        *number_columns(*COLUMNS),
        Column(header="seeds agree", align="left", wraps=True),
    )
    seeds = ", ".join(map(str, result.seeds))
    notes = (
        "agreement: share of assignments to experts that are matched with each other, in both of two seeds; the"
        " matching has the most tokens in common (Hungarian method); mean over pairs of seeds.",
        f"by chance: the same, matched again, with the tokens of one seed in random order, so that loads stay as they"
        f" are (mean of {NUM_PERMUTATIONS}); corrected: (agreement - chance) / (1 - chance).",
        "Interval: jackknife over seeds, from three on; 95 % for all layers together (Bonferroni).",
        f"probe set: {result.probe_set.num_tokens} positions of the validation split.",
    )
    title = f"Agreement of {format_plural(len(result.seeds), 'seed')} ({seeds}): {result.arm}"
    return Report(tables=(Table(title=title, columns=columns, rows=tuple(rows)),), notes=notes, values=result.to_dict())


def draw_agreement(result: SeedAgreement, path: Path) -> Path:
    """Draw the agreement of each layer: a dot for each pair of seeds, their mean, and what chance gives."""
    names = list(result.layers)
    title = f"Agreement of experts between seeds: {result.arm}"
    with new_figure(path, title, width=max(5.0, 1.4 + 0.7 * len(names)), height=3.8) as figure:
        ax = figure.subplots()
        for position, layer in enumerate(result.layers.values()):
            values = [pair.agreement for pair in layer.pairs]
            ax.plot([position] * len(values), values, "o", color=PALETTE[1], markersize=4, alpha=0.6)
            ax.hlines(layer.agreement, position - 0.25, position + 0.25, color=PALETTE[1], linewidth=2)
            ax.hlines(layer.chance, position - 0.35, position + 0.35, color=GREY, linestyle=":", linewidth=1.5)
        ax.set_xticks(range(len(names)), names)
        ax.set_xlim(-0.6, len(names) - 0.4)
        ax.set_ylim(0, 1.02)
        ax.set_ylabel("share of assignments")
        ax.set_xlabel("layer (dots: pairs of seeds; bar: mean; dotted: by chance)")
    return path
