"""Metrics of trivial baselines, computed as those of the arms are."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moebench.tasks.domain_metrics import average_by_domain

if TYPE_CHECKING:
    from moebench.tasks.task import Batch, Task

EVAL_BATCH = 256
"""Sequences of the evaluation set that are read at a time; the values do not depend on it."""
Values = np.ndarray
"""An array of numbers; its name carries the shape."""


class CodeLength:
    """Code lengths and bytes of text, summed by domain: becomes a metric in bits per byte, as that of the arms is."""

    def __init__(self, task: Any, num_methods: int) -> None:
        """`task`: a task on text, of whose metric the values are."""
        self.task = task
        self.nats_MD = np.zeros((num_methods, len(task.domains)))
        self.weight_D = np.zeros(len(task.domains))

    def add(self, nats_MN: Values, domain_N: Values) -> None:
        """Add the code length of each of N symbols by each of M methods."""
        for row, nats_N in enumerate(nats_MN):
            self.nats_MD[row] += np.bincount(domain_N, weights=nats_N, minlength=len(self.weight_D))

    def add_weight(self, batch: "Batch") -> None:
        """Add the bytes of the predictions of a batch, the denominator of the metric."""
        weight_BP = batch.weight_BP if batch.count_BP is None else batch.weight_BP.where(batch.count_BP > 0, 0)
        weight_B = weight_BP.sum(1).double().numpy()
        self.weight_D += np.bincount(batch.domain_B.numpy(), weights=weight_B, minlength=len(self.weight_D))

    def values(self, method: int) -> dict[str, float]:
        """Return the metric of one method: over the domains of training, out of domain and for each domain."""
        task, bits_D = self.task, torch.from_numpy(self.nats_MD[method] / math.log(2))
        return average_by_domain(task.metric, bits_D, torch.from_numpy(self.weight_D), task.domains, task.num_held_out)


def evaluate_outputs(
    task: "Task", batches: Iterable["Batch"], predict: Callable[["Batch"], Tensor]
) -> dict[str, float]:
    """Return the metrics of a task for outputs that `predict` computes in place of a model."""
    sums: dict[str, Tensor] = {}
    for batch in batches:
        for name, value in task.compute_sums(predict(batch), batch).items():
            zeros = torch.zeros(len(task.domains), *value.shape[1:], dtype=torch.float64)
            sums[name] = sums.get(name, zeros).index_add(0, batch.domain_B, value.double())
    return task.compute_quality(sums)


def keep_metrics(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the values of the named metrics and of their domains."""
    return {name: value for name, value in values.items() if name.split("/")[0] in names}
