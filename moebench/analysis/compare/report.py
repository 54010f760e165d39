"""The comparison as a report: small tables, a line for each failure, a legend."""

from collections.abc import Sequence
from statistics import fmean

from moebench.analysis.compare.axes import build_axis_tables
from moebench.analysis.compare.budget import build_budget_table
from moebench.analysis.compare.design_report import build_design_tables
from moebench.analysis.compare.legend import build_legend
from moebench.analysis.compare.sentences import describe_margin, list_verdicts
from moebench.analysis.compare.trivial_rows import (
    list_out_of_domain_rows,
    list_quality_notes,
    list_quality_rows,
)
from moebench.analysis.compare.tuning import EDGE, build_tuning_table, list_tuning_notes
from moebench.analysis.compare.values import ArmSummary, Comparison, Difference, LostCell
from moebench.reporting.formatting import MISSING, format_p, format_signed, format_with_interval
from moebench.reporting.metrics import format_metric, metric_headers
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

VERDICT_STYLES = {"better": "bold green", "worse": "red", "equivalent": "cyan", "not matched": "yellow"}
DIVERGED_STYLE = "bold red"
LOAD = ("max_violation", "cv", "entropy", "dead_experts", "drop_rate", "train_drop_rate", "unserved")
COMPUTE = (
    *("flops_per_token", "train_flops_per_token", "eval_flops_per_token"),
    *("experts_per_token", "train_experts_per_token", "eval_experts_per_token"),
)
PROCESSES = (
    *("processes", "all_to_all_share", "wait_share", "sent_mib", "rank_load_max"),
    *("tokens_per_s_per_device", "peak_memory_gib"),
)


def build_report(comparison: Comparison) -> Report:
    """Return the tables that have rows, the failures, the legend and the JSON values of a comparison."""
    tables = (
        _quality_table(comparison),
        *build_axis_tables(comparison),
        build_tuning_table(comparison.tuning),
        _out_of_domain_table(comparison),
        _statistics_table(comparison),
        _size_table(comparison),
        *build_design_tables(comparison),
        _load_table(comparison),
        _information_table(comparison),
        _compute_table(comparison),
        build_budget_table(comparison),
        _cost_table(comparison),
        _process_table(comparison),
    )
    return Report(
        tables=tuple(table for table in tables if table.rows),
        caveats=list_caveats(comparison),
        problems=list_lost_cells(comparison),
        notes=build_legend(comparison),
        values=comparison.to_dict(),
    )


def list_caveats(comparison: Comparison) -> tuple[str, ...]:
    """Return what limits the verdicts, and how settings were chosen."""
    warning = comparison.rare_bad_seeds
    return (
        *([warning.describe()] if warning else []),
        *(f"{note}." for note in list_tuning_notes(comparison.tuning) if not note.startswith(EDGE)),
        *(f"Note: {note}." for note in comparison.notes),
    )


def list_lost_cells(comparison: Comparison) -> tuple[str, ...]:
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


def _columns(*headers: str) -> tuple[Column, ...]:
    """Return a column for arms and columns for numbers; the first three of these never wrap."""
    numbers = (Column(header=header, wraps=index >= 3) for index, header in enumerate(headers))
    return (Column(header="arm", align="left", wraps=True), *numbers)


def _quality_table(comparison: Comparison) -> Table:
    direction = "lower" if comparison.lower_is_better else "higher"
    verdict = Column(header="verdict", align="left", wraps=True, style=_verdict_style)
    return Table(
        title=f"Quality: {comparison.metric.replace('_', ' ')} on the {comparison.split} split, {direction} is better",
        columns=(*_columns("seeds", "mean", f"minus {comparison.baseline}", *metric_headers("p_holm")), verdict),
        rows=(*(_quality_row(comparison, arm) for arm in comparison.arms), *list_quality_rows(comparison)),
        notes=(*list_quality_notes(comparison), *list_verdicts(comparison)),
        marked=bool(comparison.below_trivial_text),
    )


def _quality_row(comparison: Comparison, arm: ArmSummary) -> tuple[str, ...]:
    seeds = str(arm.num_done) if arm.num_done == arm.num_planned else f"{arm.num_done} of {arm.num_planned}"
    mean = format_with_interval(arm.mean, arm.interval)
    verdict = comparison.describe_verdict(arm.arm)
    difference = comparison.find_difference(arm.arm)
    if difference is None:
        return (_label(arm), seeds, mean, MISSING, MISSING, verdict)
    delta = format_with_interval(difference.mean, difference.interval, format_signed)
    return (_label(arm), seeds, mean, delta, format_p(difference.p_holm), verdict)


def _verdict_style(verdict: str) -> str:
    return DIVERGED_STYLE if verdict.endswith("diverged") else VERDICT_STYLES.get(verdict, "")


def _out_of_domain_table(comparison: Comparison) -> Table:
    return Table(
        title=f"Out of domain: {comparison.metric.replace('_', ' ')}, no verdict",
        columns=_columns("seeds", "mean", f"minus {comparison.baseline}", "minus in domain"),
        rows=(
            *(_out_of_domain_row(comparison, arm) for arm in comparison.arms if arm.out_of_domain),
            *list_out_of_domain_rows(comparison),
        ),
    )


def _out_of_domain_row(comparison: Comparison, arm: ArmSummary) -> tuple[str, ...]:
    mean, in_domain = arm.out_of_domain_mean or 0.0, fmean(arm.values[seed] for seed in arm.out_of_domain)
    pair = comparison.out_of_domain_difference(arm)
    return (
        _label(arm),
        str(len(arm.out_of_domain)),
        format_with_interval(mean, arm.out_of_domain_interval),
        MISSING if pair is None else format_with_interval(pair.mean, pair.interval, format_signed),
        format_signed(mean - in_domain),
    )


def _statistics_table(comparison: Comparison) -> Table:
    headers = metric_headers("p", "p_pooled", "p_holm", "p_exact", "smallest_detectable")
    return Table(
        title=f"How sure: {comparison.baseline} subtracted seed by seed",
        columns=_columns("pairs", *headers, "power"),
        rows=tuple(_statistics_row(pair) for pair in comparison.differences if pair.p is not None),
        is_detail=True,
    )


def _statistics_row(difference: Difference) -> tuple[str, ...]:
    return (
        difference.arm,
        str(len(difference.seeds)),
        format_p(difference.p),
        format_p(difference.p_pooled),
        format_p(difference.p_holm),
        format_p(difference.p_exact),
        format_metric("smallest_detectable", difference.smallest_detectable),
        "low" if difference.low_power else MISSING,
    )


def _size_table(comparison: Comparison) -> Table:
    effect, equivalence = metric_headers("effect_sd", "p_equivalence_holm")
    return Table(
        title=f"How large: minus {comparison.baseline}, margin of equivalence {describe_margin(comparison)}",
        columns=_columns("all together", effect, "g, 95 %", equivalence),
        rows=tuple(_size_row(pair) for pair in comparison.differences if pair.p is not None),
        is_detail=True,
    )


def _size_row(difference: Difference) -> tuple[str, ...]:
    effect = MISSING
    if difference.effect_interval:
        effect = " to ".join(format_metric("effect_sd", bound) for bound in difference.effect_interval)
    return (
        difference.arm,
        format_with_interval(difference.mean, difference.simultaneous_interval, format_signed),
        format_metric("effect_sd", difference.effect_sd),
        effect,
        format_p(difference.p_equivalence_holm),
    )


def _load_table(comparison: Comparison) -> Table:
    arms = [arm for arm in comparison.arms if arm.load]
    shown = [name for name in LOAD if any(name in arm.load for arm in arms)]
    return Table(
        title="Expert load on the evaluation set, mean over expert layers",
        columns=_columns(*metric_headers(*(f"load/{name}" for name in shown))),
        rows=tuple(
            (_label(arm), *(format_metric(f"load/{name}", arm.load.get(name)) for name in shown)) for arm in arms
        ),
    )


def _information_table(comparison: Comparison) -> Table:
    arms = [arm for arm in comparison.arms if arm.information]
    kinds = list(dict.fromkeys(kind for arm in arms for kind in arm.information))
    name = "load/information/KIND"
    return Table(
        title="Information of experts about tokens",
        columns=_columns(*kinds),
        rows=tuple((_label(arm), *(format_metric(name, arm.information.get(kind)) for kind in kinds)) for arm in arms),
        is_detail=True,
    )


def _compute_table(comparison: Comparison) -> Table:
    headers = metric_headers(*COMPUTE)
    return Table(
        title="Compute per token: planned, and executed in training (train) and evaluation (eval)",
        columns=_columns(*headers[:3], "× baseline", *headers[3:]),
        rows=tuple(_compute_row(arm) for arm in comparison.arms if arm.num_done),
    )


def _compute_row(arm: ArmSummary) -> tuple[str, ...]:
    flops = [format_metric(name, arm.cost.get(name)) for name in COMPUTE[:3]]
    experts = [format_metric(name, arm.cost.get(name) or None) for name in COMPUTE[3:]]  # a dense arm has 0
    ratios = " / ".join(f"{ratio:.2f}" for ratio in arm.flops_vs_baseline.values())
    return (_label(arm), *flops, ratios or MISSING, *experts)


def _cost_table(comparison: Comparison) -> Table:
    speeds = ["tokens_per_s", "share_of_baseline"]
    speeds += ["mfu"] * any(arm.mfu is not None for arm in comparison.arms)  # known on some GPUs alone
    return Table(
        title="Cost: speed, parameters",
        columns=_columns(*metric_headers(*speeds, "active_params", "total_params")),
        rows=tuple(_cost_row(arm, speeds) for arm in comparison.arms if arm.num_done),
    )


def _cost_row(arm: ArmSummary, speeds: Sequence[str]) -> tuple[str, ...]:
    values = {"tokens_per_s": arm.tokens_per_s, "share_of_baseline": arm.throughput_share, "mfu": arm.mfu}
    return (
        _label(arm),
        *(format_metric(name, values[name]) for name in speeds),
        *(format_metric(name, arm.cost.get(name)) for name in ("active_params", "total_params")),
    )


def _process_table(comparison: Comparison) -> Table:
    names = [f"parallel/{name}" for name in PROCESSES]
    return Table(
        title="Cost of communication between processes, mean over the logged steps",
        columns=_columns(*metric_headers(*names)),
        rows=tuple(
            (_label(arm), *(format_metric(f"parallel/{name}", arm.parallel[name]) for name in PROCESSES))
            for arm in comparison.arms
            if arm.parallel
        ),
    )


def _label(arm: ArmSummary) -> str:
    return f"{arm.arm} ({', '.join(arm.marks)})" if arm.marks else arm.arm
