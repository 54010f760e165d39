"""The change of the loss by an intervention: paired by prediction, with intervals over sequences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import t as student_t
from torch import Tensor

from moebench.tasks.task import Batch, LabelKind, Task

MIN_SEQUENCES = 5
"""A label that fewer sequences have gets no interval."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A change of the mean loss, in nats per prediction."""

    change: float
    error: float | None
    """Standard error over sequences; None below `MIN_SEQUENCES`."""
    num_sequences: int

    def interval(self, num_comparisons: int) -> tuple[float, float] | None:
        """Return the interval that covers, together with those of all comparisons, with 95 % (Bonferroni)."""
        if self.error is None:
            return None
        quantile = float(student_t.ppf(1 - 0.025 / max(num_comparisons, 1), self.num_sequences - 1))
        return self.change - quantile * self.error, self.change + quantile * self.error

    def to_dict(self, num_comparisons: int) -> dict[str, Any]:
        """Return JSON-ready values."""
        interval = self.interval(num_comparisons)
        return {
            "change": self.change,
            "interval": list(interval) if interval else None,
            "sequences": self.num_sequences,
        }


def compute_effect(change_S: Tensor, count_S: Tensor) -> Effect:
    """Return Σ change / Σ count over sequences, with the standard error of the ratio (linearised).

    `change_S`: summed change of the loss of each sequence; `count_S`: its predictions.
    """
    counted_S = count_S > 0
    change_S, count_S = change_S[counted_S], count_S[counted_S]
    number, total = len(count_S), float(count_S.sum())
    if number == 0:
        return Effect(change=0.0, error=None, num_sequences=0)
    mean = float(change_S.sum()) / total
    if number < MIN_SEQUENCES:
        return Effect(change=mean, error=None, num_sequences=number)
    residual_S = change_S - mean * count_S
    error = (number / (number - 1) * float(residual_S @ residual_S)) ** 0.5 / total
    return Effect(change=mean, error=error, num_sequences=number)


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """The predictions of a probe set: how each counts in the mean loss, and its label of every kind."""

    count: Sequence[Tensor]
    """One fp64 [B, P] for each batch; 0 where nothing is predicted."""
    kinds: Sequence[LabelKind]
    """Kinds of labels that apply to a prediction."""
    labels: Mapping[str, Sequence[Tensor]]
    """Kind -> one int64 [B, P] for each batch."""

    @classmethod
    def of(cls, task: Task, batches: Sequence[Batch]) -> "Predictions":
        """Read counts and labels of all batches."""
        read = [batch if batch.decoder_input_BP is None else batch.decoder_batch for batch in batches]
        kinds = [kind for kind in task.label_kinds() if len(kind.values) > 1 and _applies(kind, read[0])]
        return cls(
            count=[_count(batch) for batch in batches],
            kinds=kinds,
            labels={kind.name: [_read_labels(kind, batch) for batch in read] for kind in kinds},
        )

    def compute_effect(self, changes: Sequence[Tensor]) -> Effect:
        """Return the effect on all predictions; `changes`: of the loss, one fp64 [B, P] for each batch."""
        change_S = torch.cat([change_BP.sum(1) for change_BP in changes])
        return compute_effect(change_S, torch.cat([count_BP.sum(1) for count_BP in self.count]))

    def compute_label_effects(self, changes: Sequence[Tensor]) -> dict[str, dict[str, Effect]]:
        """Return kind -> label -> the effect on its predictions, for the labels that occur."""
        effects: dict[str, dict[str, Effect]] = {}
        for kind in self.kinds:
            num_labels = len(kind.values)
            parts = zip(changes, self.count, self.labels[kind.name], strict=True)
            sums = [(_sum(change, label, num_labels), _sum(count, label, num_labels)) for change, count, label in parts]
            change_SY, count_SY = (torch.cat(tables) for tables in zip(*sums, strict=True))
            present = (count_SY > 0).any(0).nonzero().squeeze(1).tolist()
            effects[kind.name] = {
                kind.values[index]: compute_effect(change_SY[:, index], count_SY[:, index]) for index in present
            }
        return effects


def compute_losses(task: Task, output: Any, batch: Batch) -> Tensor:
    """Return the loss of each prediction in nats, fp64 [B, P] on the CPU; 0 where nothing is predicted."""
    nats_BP = task.loss(output, batch).double().cpu()
    return nats_BP if batch.count_BP is None else nats_BP.where(batch.count_BP.cpu() > 0, 0.0)


def _count(batch: Batch) -> Tensor:
    count_BP = torch.ones_like(batch.weight_BP) if batch.count_BP is None else batch.count_BP
    return count_BP.double().cpu()


def _applies(kind: LabelKind, batch: Batch) -> bool:
    """Return whether each prediction has a label: those of positions say nothing of one prediction for a sequence."""
    num_labels = kind.read(batch).shape[-1]
    return num_labels == 1 or num_labels == batch.input_BL.shape[1] == batch.num_predictions


def _read_labels(kind: LabelKind, batch: Batch) -> Tensor:
    return kind.read(batch).expand(len(batch.domain_B), batch.num_predictions).cpu()


def _sum(value_BP: Tensor, label_BP: Tensor, num_labels: int) -> Tensor:
    """Return the sum over the predictions of each sequence and label, [B, labels]; other labels count nowhere."""
    known_BP = (label_BP >= 0) & (label_BP < num_labels)
    sums_BY = value_BP.new_zeros(len(value_BP), num_labels)
    return sums_BY.scatter_add(1, label_BP.clamp(0, num_labels - 1), value_BP.where(known_BP, 0.0))
