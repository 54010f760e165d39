"""The test text of a task by domain: whether two tasks measure the same, and how much each domain weighs."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from moebench.tasks.domain_metrics import metric_names
from moebench.tasks.task import Task

BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class DomainText:
    """The test samples of a domain."""

    digest: str
    """Of inputs, targets and weights: equal where two tasks measure the same."""
    weight: float
    """Size in units of the metric, such as bytes."""


@dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """The test samples of a task; domains have the names that they have in metrics."""

    domains: Mapping[str, DomainText]
    trained: tuple[str, ...]
    """Domains that the task trains on."""

    def has(self, other: "EvaluationText", domain: str) -> bool:
        """Return whether a domain of another task is here too, with the same samples."""
        return domain in self.domains and self.domains[domain].digest == other.domains[domain].digest

    def average(self, values: Mapping[str, float], domains: Sequence[str]) -> float:
        """Return the mean of values by domain, weighted by size."""
        weights = [self.domains[domain].weight for domain in domains]
        return sum(values[domain] * weight for domain, weight in zip(domains, weights, strict=True)) / sum(weights)


def read_evaluation_text(task: Task) -> EvaluationText:
    """Return the test samples of a task: digests and sizes of all domains that have any."""
    names = metric_names(tuple(task.domains))
    hashes = [hashlib.sha256() for _ in names]
    weights = [0.0] * len(names)
    for batch in task.eval_batches("test", BATCH_SIZE):
        parts = [batch.input_BL, batch.target_BP, batch.weight_BP, batch.decoder_input_BP]
        for domain in sorted(set(batch.domain_B.tolist())):
            is_domain_B = batch.domain_B == domain
            for part in parts:
                if part is not None:
                    hashes[domain].update(_to_bytes(part[is_domain_B]))
            weights[domain] += float(batch.weight_BP[is_domain_B].sum())
    return EvaluationText(
        domains={
            name: DomainText(digest=digest.hexdigest(), weight=weight)
            for name, digest, weight in zip(names, hashes, weights, strict=True)
            if weight
        },
        trained=names[: task.num_trained_domains],
    )


def _to_bytes(rows: Tensor) -> bytes:
    return f"{tuple(rows.shape[1:])}".encode() + rows.contiguous().numpy().tobytes()
