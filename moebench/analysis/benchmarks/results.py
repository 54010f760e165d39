"""The results of a model on a task: metrics with their errors, and trivial references."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, sqrt
from typing import Any

import numpy as np

from moebench.analysis.benchmarks.records import ItemResult
from moebench.analysis.statistics.seed_values import Values

BITS_PER_BYTE = "bits_per_byte"
ACCURACIES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
"""Metrics with trivial references that need no model."""
MEAN_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A model on one task."""

    subject: str
    """The id of a run, or the folder of a model."""
    task: str
    items: tuple[ItemResult, ...]
    metrics: Mapping[str, float]
    """Metric -> value over all items, as lm-eval aggregates it."""
    higher_is_better: Mapping[str, bool]
    file: str = ""
    """Where the results by item are; empty where they are not stored."""

    @property
    def main_metric(self) -> str:
        """The first metric of the task, by which arms are compared."""
        return next(iter(self.metrics))

    @property
    def num_truncated(self) -> int:
        """Items that the model could not read as a whole."""
        return sum(item.is_truncated for item in self.items)

    def is_better_if_higher(self, metric: str) -> bool:
        """Return the direction of a metric; of metrics behind filters of the answer (`exact_match,strict`) too."""
        return self.higher_is_better.get(metric.partition(",")[0], True)

    def standard_error(self, metric: str) -> float | None:
        """Return the standard error over items; None where the metric is no mean over items or there is one item.

        Of bits per byte, a ratio of two sums, by linearisation.
        """
        values_I = self.item_values(metric)
        if values_I is None or len(values_I) < 2:
            return None
        residual_I = values_I - values_I.mean() * self.item_weights(metric)
        return float(sqrt((residual_I**2).sum() / (len(values_I) - 1) / len(values_I)))

    def item_values(self, metric: str) -> Values | None:
        """Return one value for each item, whose mean is the metric; None where the metric is no such mean."""
        raw = [item.metrics.get(metric) for item in self.items]
        if not raw or any(value is None for value in raw):
            return None
        if metric == BITS_PER_BYTE:
            nats_I, _ = np.array(raw, dtype=np.float64).T
            return np.asarray(-nats_I / log(2) * len(raw) / self._sum_weights(metric))
        if any(isinstance(value, tuple) for value in raw):
            return None
        values_I = np.array(raw, dtype=np.float64)
        is_mean = abs(values_I.mean() - self.metrics[metric]) <= MEAN_TOLERANCE
        return values_I if is_mean else None

    def item_weights(self, metric: str) -> Values:
        """Return the weight of each item in a metric, with mean 1."""
        if metric != BITS_PER_BYTE:
            return np.ones(len(self.items))
        weights_I = np.array([_read_weight(item.metrics[metric]) for item in self.items])
        return np.asarray(weights_I * len(weights_I) / weights_I.sum())

    def _sum_weights(self, metric: str) -> float:
        return sum(_read_weight(item.metrics[metric]) for item in self.items)

    def by_domain(self, metric: str) -> dict[str, tuple[float, int]]:
        """Return domain -> mean over its items and their number; empty without domains."""
        values_I, weights_I = self.item_values(metric), self.item_weights(metric)
        domains = [item.domain for item in self.items]
        if values_I is None or None in domains:
            return {}
        names = dict.fromkeys(domain for domain in domains if domain is not None)
        rows = {name: np.array([domain == name for domain in domains]) for name in names}
        return {name: (float(values_I[row].sum() / weights_I[row].sum()), int(row.sum())) for name, row in rows.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values, without the items."""
        return {
            "metrics": {
                metric: {
                    "value": value,
                    "standard_error": self.standard_error(metric),
                    "higher_is_better": self.is_better_if_higher(metric),
                    "domains": {name: mean for name, (mean, _) in self.by_domain(metric).items()},
                }
                for metric, value in self.metrics.items()
            },
            "items": len(self.items),
            "truncated": self.num_truncated,
            "file": self.file,
        }


def _read_weight(value: float | tuple[float, float]) -> float:
    return value[1] if isinstance(value, tuple) else 1.0


def compute_trivial_accuracy(items: Sequence[ItemResult]) -> dict[str, float]:
    """Return the accuracy of a random choice, and that of the most frequent position; empty without choices.

    The position is chosen by the answers of these items: no constant answer has more.
    """
    counted = [item for item in items if item.num_choices and item.gold]
    if not counted or len(counted) < len(items):
        return {}
    chance = sum(len(item.gold) / (item.num_choices or 1) for item in counted) / len(counted)
    positions = Counter(position for item in counted for position in set(item.gold))
    return {"chance": chance, "constant answer": max(positions.values()) / len(counted)}
