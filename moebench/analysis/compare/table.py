"""The comparison as a reader sees it: two small tables, a legend in plain words, and all that went wrong."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from moebench.analysis.compare import statistics as st
from moebench.analysis.compare.legend import legend
from moebench.analysis.compare.values import ArmSummary, Comparison, Difference, LostCell
from moebench.reporting.formatting import NOTHING, format_count, number, p_value, signed

STYLES = {"better": "bold green", "worse": "red", "not matched": "yellow"}
DIVERGED_STYLE = "bold red"
LOAD_COLUMNS = {
    "max_violation": "MaxVio",
    "cv": "CV",
    "entropy": "entropy",
    "dead_experts": "dead",
    "drop_rate": "dropped",
    "train_drop_rate": "in training",
    "unserved": "unserved",
}
SHARES = ("drop_rate", "train_drop_rate", "unserved")
"""Load metrics that are shown in percent."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """One table as text: a title, a header, and a row of cells per arm; the first column is left-aligned."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def to_rich(comparison: Comparison) -> RenderableType:
    """Return the comparison for a terminal of 80 columns or more."""
    parts: list[RenderableType] = []
    for grid in grids(comparison):
        parts += [rich_grid(grid), Text()]
    parts += [Text(line, style="red" if line.startswith("FAILED") else "yellow") for line in losses(comparison)]
    parts += [Text(line, style="dim") for line in legend(comparison)]
    return Group(*parts)


def to_markdown(comparison: Comparison) -> str:
    """Return the comparison as Markdown, ending in a newline."""
    parts = [markdown_grid(grid) for grid in grids(comparison)]
    parts += ["\n".join(f"- {line}" for line in lines) for lines in (losses(comparison), legend(comparison))]
    return "\n\n".join(part for part in parts if part) + "\n"


def to_json(comparison: Comparison) -> str:
    """Return the comparison as one JSON object, numbers unrounded."""
    return json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)


def grids(comparison: Comparison) -> tuple[Grid, ...]:
    """Return the tables that have something to show: quality, how sure, expert load, what experts know, cost."""
    found = (
        _quality_grid(comparison),
        _outside_grid(comparison),
        _certainty_grid(comparison),
        _load_grid(comparison),
        _information_grid(comparison),
        _compute_grid(comparison),
        _cost_grid(comparison),
        _parallel_grid(comparison),
    )
    return tuple(grid for grid in found if grid.rows)


def _quality_grid(comparison: Comparison) -> Grid:
    direction = "lower" if comparison.lower_is_better else "higher"
    return Grid(
        title=f"Quality: {comparison.metric.replace('_', ' ')} on the {comparison.split} split, {direction} is better",
        header=("arm", "seeds", "mean", f"minus {comparison.baseline}", "p Holm", "verdict"),
        rows=tuple(_quality_row(comparison, arm) for arm in comparison.arms),
    )


def _quality_row(comparison: Comparison, arm: ArmSummary) -> tuple[str, ...]:
    seeds = str(arm.num_done) if arm.num_done == arm.num_planned else f"{arm.num_done} of {arm.num_planned}"
    mean = NOTHING if arm.mean is None else number(arm.mean) + _half(arm.interval)
    verdict = comparison.describe_verdict(arm.arm)
    difference = comparison.find_difference(arm.arm)
    if difference is None:
        return (_name(arm), seeds, mean, NOTHING, NOTHING, verdict)
    delta = NOTHING if difference.mean is None else signed(difference.mean) + _half(difference.interval)
    return (_name(arm), seeds, mean, delta, p_value(difference.p_holm), verdict)


def _outside_grid(comparison: Comparison) -> Grid:
    return Grid(
        title=f"Out of domain: {comparison.metric.replace('_', ' ')}, no verdict",
        header=("arm", "seeds", "mean", f"minus {comparison.baseline}", "minus in domain"),
        rows=tuple(_outside_row(comparison, arm) for arm in comparison.arms if arm.outside),
    )


def _outside_row(comparison: Comparison, arm: ArmSummary) -> tuple[str, ...]:
    mean, inside = arm.outside_mean or 0.0, fmean(arm.values[seed] for seed in arm.outside)
    pair = comparison.outside_difference(arm)
    delta = NOTHING if pair is None else signed(pair.mean) + _half(pair.interval)
    return (_name(arm), str(len(arm.outside)), number(mean) + _half(arm.outside_interval), delta, signed(mean - inside))


def _certainty_grid(comparison: Comparison) -> Grid:
    tested = [difference for difference in comparison.differences if difference.p is not None]
    return Grid(
        title=f"How sure: {comparison.baseline} subtracted seed by seed",
        header=("arm", "pairs", "p", "p Holm", "exact p", "seed SD", "detectable", "power"),
        rows=tuple(_certainty_row(difference) for difference in tested),
    )


def _certainty_row(difference: Difference) -> tuple[str, ...]:
    return (
        difference.arm,
        str(len(difference.seeds)),
        p_value(difference.p),
        p_value(difference.p_holm),
        p_value(difference.p_exact),
        NOTHING if difference.effect_sd is None else signed(difference.effect_sd, 1),
        NOTHING if difference.smallest_detectable is None else number(difference.smallest_detectable),
        "low" if difference.low_power else NOTHING,
    )


def _load_grid(comparison: Comparison) -> Grid:
    arms = [arm for arm in comparison.arms if arm.load]
    shown = [key for key in LOAD_COLUMNS if any(key in arm.load for arm in arms)]
    return Grid(
        title="Expert load on the evaluation set, mean over expert layers",
        header=("arm", *(LOAD_COLUMNS[key] for key in shown)),
        rows=tuple((_name(arm), *(_load(key, arm.load.get(key)) for key in shown)) for arm in arms),
    )


def _information_grid(comparison: Comparison) -> Grid:
    known = {arm.arm: arm.known for arm in comparison.arms}
    arms = [arm for arm in comparison.arms if known[arm.arm]]
    kinds = list(dict.fromkeys(key for arm in arms for key in known[arm.arm]))
    return Grid(
        title="What experts know of a token",
        header=("arm", *kinds),
        rows=tuple((_name(arm), *(_share(known[arm.arm].get(key)) for key in kinds)) for arm in arms),
    )


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def _compute_grid(comparison: Comparison) -> Grid:
    return Grid(
        title="Compute per token: planned, and executed in training (train) and evaluation (eval)",
        header=("arm", "FLOPs", "train", "eval", "× baseline", "experts", "train", "eval"),
        rows=tuple(_compute_row(arm) for arm in comparison.arms if arm.num_done),
    )


def _compute_row(arm: ArmSummary) -> tuple[str, ...]:
    phases = ("", "train_", "eval_")
    flops = [format_count(arm.cost.get(f"{phase}flops_per_token")) for phase in phases]
    experts = [arm.cost.get(f"{phase}experts_per_token") for phase in phases]
    ratios = (f"{ratio:.2f}" for ratio in arm.flops_vs_baseline.values())
    return (
        _name(arm),
        *flops,
        " / ".join(ratios) or NOTHING,
        *(NOTHING if not value else f"{value:.2f}" for value in experts),
    )


def _cost_grid(comparison: Comparison) -> Grid:
    return Grid(
        title="Cost: speed, parameters",
        header=("arm", "tokens/s", "of baseline", "active", "total"),
        rows=tuple(_cost_row(arm) for arm in comparison.arms if arm.num_done),
    )


def _cost_row(arm: ArmSummary) -> tuple[str, ...]:
    return (
        _name(arm),
        format_count(arm.tokens_per_s),
        NOTHING if arm.throughput_share is None else f"{100 * arm.throughput_share:.0f} %",
        *(format_count(arm.cost.get(key)) for key in ("active_params", "total_params")),
    )


def _parallel_grid(comparison: Comparison) -> Grid:
    return Grid(
        title="Processes: what they cost each other, mean over the logged steps",
        header=("arm", "processes", "all-to-all", "waiting", "sent/step", "busiest", "tokens/s each", "memory"),
        rows=tuple(_parallel_row(arm) for arm in comparison.arms if arm.parallel),
    )


def _parallel_row(arm: ArmSummary) -> tuple[str, ...]:
    found = arm.parallel
    return (
        _name(arm),
        f"{found['processes']:.0f}",
        f"{100 * found['all_to_all_share']:.1f} %",
        f"{100 * found['wait_share']:.1f} %",
        f"{found['sent_mib']:.2f} MiB",
        f"{found['rank_load_max']:.2f}",
        format_count(found["tokens_per_s_per_device"]),
        f"{found['peak_memory_gib']:.2f} GiB",
    )


def losses(comparison: Comparison) -> tuple[str, ...]:
    """Return one line per failed cell with its reason, and one per arm with missing cells."""
    missing: dict[str, list[LostCell]] = {}
    for cell in comparison.missing:
        missing.setdefault(cell.arm, []).append(cell)
    return (
        *(f"FAILED {cell.arm}, seed {cell.seed} ({cell.id}): {cell.reason}" for cell in comparison.failed),
        *(
            f"MISSING {arm}: {cells[0].reason} for seed {', '.join(str(cell.seed) for cell in cells)}"
            for arm, cells in missing.items()
        ),
    )


def _name(arm: ArmSummary) -> str:
    return f"{arm.arm} ({', '.join(arm.marks)})" if arm.marks else arm.arm


def _half(interval: st.Interval | None) -> str:
    return f" ± {number((interval[1] - interval[0]) / 2)}" if interval else ""


def _load(key: str, value: float | None) -> str:
    if value is None:
        return NOTHING
    return f"{100 * value:.1f} %" if key in SHARES else f"{value:.1f}" if key == "dead_experts" else f"{value:.2f}"


def rich_grid(grid: Grid) -> Table:
    """Return one table for a terminal."""
    table = Table(
        title=grid.title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for index, name in enumerate(grid.header):
        justify: JustifyMethod = "left" if index == 0 or name == "verdict" else "right"
        table.add_column(name, justify=justify, no_wrap=index in (1, 2, 3), overflow="fold")
    for row in grid.rows:
        style = DIVERGED_STYLE if row[-1].endswith("diverged") else STYLES.get(row[-1], "")
        table.add_row(*map(Text, row[:-1]), Text(row[-1], style=style))
    return table


def markdown_grid(grid: Grid) -> str:
    """Return one table as Markdown."""
    aligned = [":--" if index == 0 or name == "verdict" else "--:" for index, name in enumerate(grid.header)]
    lines = [grid.header, aligned, *grid.rows]
    return "\n".join([f"**{grid.title}**", "", *(_markdown_line(line) for line in lines)])


def _markdown_line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
