"""The table of budgets: whether arms with `layout.match=measured_flops` executed the FLOPs that they were to."""

from moebench.analysis.compare.matching import TOLERANCE
from moebench.analysis.compare.values import ArmSummary, Comparison
from moebench.reporting.formatting import MISSING, NumberText, format_signed
from moebench.reporting.metrics import format_metric, metric_headers
from moebench.reporting.table import Column, Table

TARGET = "target_flops_per_token"
MEASURED = ("train_flops_per_token", "train_last_flops_per_token", "eval_flops_per_token")
"""Over all steps, over the last tenth of them, on the test split."""


def build_budget_table(comparison: Comparison) -> Table:
    """Return a row for each arm with a target; a note names those that missed it, in training or on the test split."""
    arms = [arm for arm in comparison.arms if TARGET in arm.cost]
    names = [metric_headers(name)[0] for name in MEASURED]
    return Table(
        title="Budget: FLOPs per token as executed, minus the target (layout.match=measured_flops)",
        columns=(
            Column(header="arm", align="left", wraps=True, is_key=True),
            *(
                Column(header=header)
                for header in (*metric_headers(TARGET), *names[:2], "test", *metric_headers("budget_value"))
            ),
            Column(header=f"within {TOLERANCE:.0%}"),
        ),
        rows=tuple(
            (
                arm.arm,
                format_metric(TARGET, arm.cost[TARGET]),
                *(_format_error(arm, name) for name in MEASURED),
                format_metric("budget_value", arm.cost["budget_value"]) if "budget_value" in arm.cost else MISSING,
                "no" if list_misses(arm) else "yes",
            )
            for arm in arms
        ),
        notes=tuple(_explain(arm) for arm in arms if list_misses(arm)),
    )


def compute_error(arm: ArmSummary, name: str) -> float | None:
    """Return a measured cost relative to the target, minus 1; mean over seeds. None where it is not known."""
    return arm.cost[name] / arm.cost[TARGET] - 1 if name in arm.cost else None


def list_misses(arm: ArmSummary) -> list[str]:
    """Return where an arm is farther from its target than arms may differ that count as matched."""
    phases = {"train_flops_per_token": "in training", "eval_flops_per_token": "on the test split"}
    errors = {phase: compute_error(arm, name) for name, phase in phases.items()}
    return [
        f"{format_signed(100 * error, 1)} % {phase}"
        for phase, error in errors.items()
        if error is not None and abs(error) > TOLERANCE + 1e-9
    ]


def _format_error(arm: ArmSummary, name: str) -> str:
    error = compute_error(arm, name)
    return MISSING if error is None else NumberText(f"{format_signed(100 * error, 2)} %", error)


def _explain(arm: ArmSummary) -> str:
    reason = "" if "budget_value" in arm.cost else ": its router declares nothing that could be adjusted"
    return f"{arm.arm} missed its target, {' and '.join(list_misses(arm))}{reason}"
