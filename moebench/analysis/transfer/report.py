"""Transfer as tables: gain and forgetting, arms beside the baseline's kind, changes by domain, costs."""

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean

from moebench.analysis import statistics as st
from moebench.analysis.compare.legend import MARK_MEANINGS
from moebench.analysis.transfer.values import ArmTransfer, Change, Transfer
from moebench.reporting.formatting import (
    MISSING,
    format_count,
    format_number,
    format_p,
    format_signed,
    format_with_interval,
)
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table

LEGEND = (
    "target gain: how much better a run is than its parent on the test text of the domains that it was trained on."
    " source forgetting: how much worse it is than its parent on those that the parent was trained on. Both are paired"
    " by seed, with 95 % t intervals from three seeds on; p Holm: corrected over the arms of the column.",
)
ARM = Column(header="arm", align="left", wraps=True, is_key=True)


def build_transfer_tables(transfer: Transfer) -> tuple[Table, ...]:
    """Return the tables of a transfer that have rows."""
    tables = (
        _build_change_table(transfer),
        _build_reference_table(transfer),
        _build_domain_table(transfer),
        _build_cost_table(transfer),
    )
    return tuple(table for table in tables if table.rows)


def add_transfer(report: Report, transfer: Transfer | None) -> Report:
    """Return a report with the tables of a transfer after its first one, and its JSON values."""
    if transfer is None:
        return report
    return replace(
        report,
        tables=(*report.tables[:1], *build_transfer_tables(transfer), *report.tables[1:]),
        notes=(*report.notes, *LEGEND),
        values=dict(report.values) | {"transfer": transfer.to_dict()},
    )


def _build_change_table(transfer: Transfer) -> Table:
    metric = transfer.metric.replace("_", " ")
    return Table(
        title=f"Transfer: {metric} on test text, run beside its parent",
        columns=(
            ARM,
            *(Column(header=header, wraps=index > 2) for index, header in enumerate(CHANGE_HEADERS)),
        ),
        rows=tuple(
            (
                arm.arm,
                str(len(arm.runs)),
                _format(arm.mean("parent_target")),
                _format_change(arm.gain),
                _format_p(arm.gain),
                _format(arm.mean("parent_source")),
                _format_change(arm.forgetting),
                _format_p(arm.forgetting),
            )
            for arm in transfer.arms
        ),
        notes=(
            *_describe_domains(transfer),
            *_describe_few_seeds(transfer.arms),
            *(f"{note}." for note in transfer.notes),
        ),
    )


CHANGE_HEADERS = ("seeds", "parent, target", "target gain", "p Holm", "parent, sources", "source forgetting", "p Holm")


def _describe_domains(transfer: Transfer) -> list[str]:
    """Return the domains of targets and sources, once for the arms that have the same."""
    arms: dict[tuple[tuple[str, ...], tuple[str, ...]], list[str]] = {}
    for arm in transfer.arms:
        arms.setdefault((arm.target, arm.sources), []).append(arm.arm)
    lines = []
    for (target, sources), names in arms.items():
        of_arms = "" if len(arms) == 1 else f"{'; '.join(names)}: "
        lines.append(f"{of_arms}target {', '.join(target)}, sources {', '.join(sources) or 'none'}.")
    return lines


def _build_reference_table(transfer: Transfer) -> Table:
    arms = [arm for arm in transfer.arms if arm.reference]
    return Table(
        title="Transfer, arms minus the arm of the baseline's kind on the same target",
        columns=(
            ARM,
            Column(header="minus", align="left", wraps=True),
            *(Column(header=header) for header in ("target gain", "p Holm", "source forgetting", "p Holm")),
        ),
        rows=tuple(
            (
                f"{arm.arm} ({', '.join(arm.reference_marks)})" if arm.reference_marks else arm.arm,
                arm.reference,
                _format_change(arm.gain_difference),
                _format_p(arm.gain_difference),
                _format_change(arm.forgetting_difference),
                _format_p(arm.forgetting_difference),
            )
            for arm in arms
        ),
        notes=tuple(_explain_marks(arms)),
    )


def _explain_marks(arms: Sequence[ArmTransfer]) -> list[str]:
    """Return what the marks of arms that are not matched with their reference mean."""
    marks = dict.fromkeys(mark for arm in arms for mark in arm.reference_marks)
    return [f"{mark}: {MARK_MEANINGS[mark]} (here the arm in the column minus)." for mark in marks]


def _describe_few_seeds(arms: Sequence[ArmTransfer]) -> list[str]:
    """Return why arms have no interval and no p value, where they have too few seeds."""
    few = [arm.arm for arm in arms if len(arm.runs) < st.MIN_SEEDS]
    names = "" if len(few) == len(arms) else f"{', '.join(few)}: "
    return [f"{names}no interval and no p value with fewer than {st.MIN_SEEDS} seeds."] if few else []


def _build_domain_table(transfer: Transfer) -> Table:
    changes = {arm.arm: arm.domain_changes for arm in transfer.arms}
    domains = list(dict.fromkeys(domain for of_arm in changes.values() for domain in of_arm))
    return Table(
        title=f"Transfer by domain: {transfer.metric.replace('_', ' ')} of the run minus its parent",
        columns=(ARM, *(Column(header=domain) for domain in domains)),
        rows=tuple(
            (arm, *(format_signed(of_arm[domain]) if domain in of_arm else MISSING for domain in domains))
            for arm, of_arm in changes.items()
            if domains
        ),
        is_detail=True,
    )


def _build_cost_table(transfer: Transfer) -> Table:
    return Table(
        title="Transfer, cost of training: the parent, the run, and both",
        columns=(ARM, *(Column(header=header) for header in ("parent FLOPs", "run FLOPs", "both", "time of both, s"))),
        rows=tuple((arm.arm, *_format_costs(arm)) for arm in transfer.arms),
        is_detail=True,
    )


def _format_costs(arm: ArmTransfer) -> tuple[str, ...]:
    parent, run = (fmean(each.train_flops[index] for each in arm.runs) for index in (0, 1))
    seconds = fmean(sum(each.train_s) for each in arm.runs)
    return (*(format_count(flops) for flops in (parent, run, parent + run)), f"{seconds:.0f}")


def _format(value: float | None) -> str:
    return MISSING if value is None else format_number(value)


def _format_change(change: Change | None) -> str:
    return MISSING if change is None else format_with_interval(change.mean, change.interval, format_signed)


def _format_p(change: Change | None) -> str:
    return MISSING if change is None else format_p(change.p_holm)
