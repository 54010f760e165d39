"""The table of the synthetic experiment: published and measured accuracy side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moebench.calibration.chen2022.measure import Outcomes, Run
from moebench.calibration.chen2022.published import PUBLISHED, Published
from moebench.calibration.chen2022.training import TrainingOutcome
from moebench.reporting.formatting import MISSING, format_signed
from moebench.reporting.report import Report
from moebench.reporting.table import Column, Table, number_columns

NOTES = (
    "Test accuracy in percent, mean ± standard deviation over runs; published: 10 runs on one data set for MoE, one run"
    " for a single network (arXiv:2208.02813, github.com/uclaml/MoE). Here each seed draws its own data.",
    "entropy: of the cluster of an example given its expert, in nats; 0: each expert has one cluster, 1.386: no"
    " specialisation.",
)


def build_report(outcomes: Outcomes) -> Report:
    """Return the table, models in turn, and its numbers."""
    keys = [key for key in PUBLISHED if key in outcomes]
    values = [_summarise(key, outcomes[key], PUBLISHED[key]) for key in keys]
    columns = (
        Column(header="model", align="left", is_key=True),
        Column(header="setting", align="left", is_key=True),
        *number_columns("published", "here", "difference", "entropy published", "entropy here", "runs"),
    )
    rows = tuple(_format_row(row) for row in values)
    return Report(tables=(Table(columns=columns, rows=rows),), notes=NOTES, values={"rows": values})


def _summarise(key: tuple[str, str], outcomes: Sequence[TrainingOutcome], published: Published) -> dict[str, Any]:
    setting, model = key
    accuracies = [outcome.accuracy for outcome in outcomes]
    entropies = [outcome.dispatch_entropy for outcome in outcomes if outcome.dispatch_entropy is not None]
    mean = statistics.fmean(accuracies)
    return {
        "setting": setting,
        "model": model,
        "published": asdict(published),
        "accuracy": mean,
        "std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        "difference": mean - published.accuracy,
        "dispatch_entropy": statistics.fmean(entropies) if entropies else None,
        "accuracies": accuracies,
    }


def _format_row(row: dict[str, Any]) -> tuple[str, ...]:
    published = row["published"]
    return (
        row["model"],
        row["setting"],
        _format_mean(published["accuracy"], published["std"]),
        _format_mean(row["accuracy"], row["std"]),
        format_signed(row["difference"], 2),
        _format_entropy(published["dispatch_entropy"]),
        _format_entropy(row["dispatch_entropy"]),
        str(len(row["accuracies"])),
    )


def _format_mean(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" + (f" ± {std:.2f}" if std is not None else "")


def _format_entropy(value: float | None) -> str:
    return MISSING if value is None else f"{value:.3f}"


def format_progress(run: Run, outcome: TrainingOutcome) -> str:
    """Return a line for one finished run."""
    entropy = "" if outcome.dispatch_entropy is None else f", entropy {outcome.dispatch_entropy:.3f}"
    return f"{run.setting.name} {run.kind.name}, seed {run.seed}: {outcome.accuracy:.2f} %{entropy}"
