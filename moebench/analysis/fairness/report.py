"""The comparison on several axes as one table."""

from dataclasses import replace

from moebench.analysis.fairness.along_axis import AxisValues, build_axis_table
from moebench.analysis.fairness.measure import describe_arm
from moebench.analysis.fairness.speed_up import SpeedUp
from moebench.analysis.fairness.values import AXIS_NAMES, EQUAL, EQUAL_NAMES, EqualBudget, Fairness
from moebench.reporting.formatting import MISSING, format_count, format_signed, format_with_interval
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

LEGEND = (
    "equal FLOPs, time: the difference where the arm has spent as much as the baseline of the same seed in total,"
    " linear in the logarithm between evaluations, never extrapolated. Time: training steps only.",
    "speed-up: how many times less the arm needs to reach the baseline's final quality; geometric mean [95 % t interval"
    " on logarithms]. <: some seeds never reached it, the value is an upper bound.",
    "Fairness is descriptive, on the validation split; the verdict is that of the first table.",
)


def build_fairness_table(fairness: Fairness) -> Table:
    """Return the table: a row for each arm with runs, one column for what is equal, then speed-ups and parameters."""
    baseline = fairness.baseline
    totals = {totals.arm: totals for totals in fairness.totals}
    rows = []
    for arm in fairness.arms:
        if not arm.seeds:
            continue
        params = [format_count(totals[arm.arm].active_params), format_count(totals[arm.arm].total_params)]
        rows.append(
            (
                arm.arm,
                str(len(arm.seeds)),
                *(_format_difference(arm.equal[name]) for name in EQUAL),
                *(format_speed_up(arm.speed_up.get(axis)) for axis in ("steps", "flops", "seconds")),
                *params,
            )
        )
    metric = fairness.metric.replace("_", " ")
    budgets = [Column(header=f"equal {EQUAL_NAMES[name]}") for name in EQUAL]
    speeds = [Column(header=f"speed-up in {AXIS_NAMES[axis]}") for axis in ("steps", "flops", "seconds")]
    return Table(
        title=f"Fairness: {metric} on the validation split minus {baseline}, speed-up to its final quality",
        columns=(
            Column(header="arm", align="left", wraps=True),
            Column(header="pairs"),
            *budgets,
            *speeds,
            Column(header="active"),
            Column(header="parameters"),
        ),
        rows=tuple(rows),
        notes=(
            *_list_outcomes(fairness),
            *(f"{note}." for note in fairness.notes),
        ),
    )


def _list_outcomes(fairness: Fairness) -> list[str]:
    """Return a sentence for each outcome, with the arms that have it."""
    arms: dict[str, list[str]] = {}
    for arm in fairness.arms:
        if arm.seeds:
            arms.setdefault(describe_arm(fairness, arm).removeprefix(arm.arm), []).append(arm.arm)
    return [f"{', '.join(names)}{outcome}." for outcome, names in arms.items()]


def add_fairness(report: Report, fairness: Fairness, along: AxisValues | None = None) -> Report:
    """Return the report of a comparison with the table on all axes, after that of quality, and its JSON values."""
    tables = [build_fairness_table(fairness)] if any(arm.seeds for arm in fairness.arms) else []
    values = dict(report.values) | {"fairness": fairness.to_dict()}
    if along is not None:
        tables.append(build_axis_table(along))
        values["along_axis"] = along.to_dict()
    return replace(
        report,
        tables=(*report.tables[:1], *tables, *report.tables[1:]),
        notes=(*report.notes, *(LEGEND if tables else ())),
        values=values,
    )


def _format_difference(budget: EqualBudget) -> str:
    if budget.pair is None:
        return budget.problem or MISSING
    return format_with_interval(budget.pair.mean, budget.pair.interval, format_signed)


def format_speed_up(speed_up: SpeedUp | None) -> str:
    """Return ×2.26 [1.88, 2.71]; with censored seeds a bound and how many there are."""
    if speed_up is None:
        return MISSING
    censored = []
    if speed_up.never:
        censored.append(f"never in {len(speed_up.never)} of {speed_up.num_seeds}")
    if speed_up.early:
        censored.append(f"before the first evaluation in {len(speed_up.early)} of {speed_up.num_seeds}")
    value = "" if speed_up.estimate is None else f"{speed_up.bound}×{speed_up.estimate:.2f}"
    interval = f" [{speed_up.interval[0]:.2f}, {speed_up.interval[1]:.2f}]" if speed_up.interval else ""
    return ", ".join(filter(None, (value + interval, *censored)))
