"""The training objective: the task loss plus coefficient times raw auxiliary loss, each part kept for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.ranks import Ranks
from moebench.routing.contract import check_objective
from moebench.routing.layer_losses import compute_losses_of_layers
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of one batch and its parts."""

    total: Tensor
    """The scalar to differentiate."""
    task: Tensor
    """Loss per prediction in nats, without any auxiliary loss: the mean over a step's micro-batches and processes is
    that over all its predictions."""
    raw: Mapping[str, Tensor]
    """Auxiliary losses before their coefficient, mean over MoE layers."""
    weighted: Mapping[str, Tensor]
    """Auxiliary losses times their coefficient, as they enter the total."""

    def detach(self) -> "Objective":
        """Return the values without their autograd graph."""
        return Objective(
            total=self.total.detach(),
            task=self.task.detach(),
            raw={name: value.detach() for name, value in self.raw.items()},
            weighted={name: value.detach() for name, value in self.weighted.items()},
        )

    def add(self, name: str, raw: Tensor, coefficient: float) -> "Objective":
        """Return the loss with one more part, which enters the total times its coefficient."""
        weighted = coefficient * raw
        return Objective(
            total=self.total + weighted,
            task=self.task,
            raw={**self.raw, name: raw},
            weighted={**self.weighted, name: weighted},
        )

    def parts(self) -> dict[str, Tensor]:
        """Return the parts under the names of the journal."""
        parts = {"loss/task": self.task, "loss/total": self.total}
        parts |= {f"loss/{name}": value for name, value in self.weighted.items()}
        parts |= {f"balance/{name}": value for name, value in self.raw.items()}
        return parts


@dataclass(frozen=True, kw_only=True)
class LossNormalizer:
    """Divides losses so that their mean over micro-batches and processes is the mean over a step's predictions."""

    num_predictions: int | Tensor
    """Sum of `Batch.count_BP` over the whole step, all its micro-batches and processes."""
    num_parts: int = 1
    """Micro-batches times processes."""

    @classmethod
    def of_single_batch(cls, batch: Batch) -> "LossNormalizer":
        """Return the normalizer of a batch that is its whole step."""
        return cls(num_predictions=_count_BP(batch).sum().clamp(min=1))

    def mean(self, value_BP: Tensor, batch: Batch) -> Tensor:
        """Return the batch's part of the mean over predictions."""
        if batch.count_BP is not None:
            value_BP = value_BP.where(batch.count_BP > 0, 0.0)
        return value_BP.sum() / self.num_predictions * self.num_parts

    def mean_over_tokens(self, value_T: Tensor, batch: Batch, *, own_predictions: bool) -> Tensor:
        """Return the batch's part of the mean of a value per token.

        Tokens without predictions of their own count by the mean of their sequence.
        """
        value_BL = value_T.view(len(batch.domain_B), -1)
        if own_predictions:
            return self.mean(value_BL, batch)
        valid_BL = torch.ones_like(value_BL) if batch.valid_BL is None else batch.valid_BL.to(value_BL.dtype)
        mean_B = (value_BL * valid_BL).sum(1) / valid_BL.sum(1).clamp(min=1)
        return (mean_B * _count_BP(batch).sum(1)).sum() / self.num_predictions * self.num_parts

    def mean_over_outputs(self, value_B: Tensor, batch: Batch) -> Tensor:
        """Return the batch's part of the mean of a value per output, [B] or [B, ...]: of predictions or of tokens."""
        value_BX = value_B.view(len(batch.domain_B), -1)
        has_own = value_BX.shape[1] == batch.num_predictions
        return self.mean_over_tokens(value_BX.reshape(-1), batch, own_predictions=has_own)


def add_token_loss(records: Sequence[LayerRecord], loss_BP: Tensor, batch: Batch) -> list[LayerRecord]:
    """Return the records with the task loss of each token, for routers that learn by reinforcement.

    It is the loss of the token's own prediction, 0 where nothing is predicted; or the mean over the predictions of its
    sequence, where their number differs from that of the tokens.
    """
    loss_BP, count_BP = loss_BP.detach(), _count_BP(batch)
    loss_BP = loss_BP.where(count_BP > 0, 0.0)
    mean_B1 = loss_BP.sum(1, keepdim=True) / count_BP.sum(1, keepdim=True).clamp(min=1)

    def token_loss_T(record: LayerRecord) -> Tensor:
        length = record.routing.num_tokens // max(len(batch.domain_B), 1)
        return (loss_BP if _has_own_predictions(record, batch) else mean_B1.expand(-1, length)).reshape(-1)

    return [replace(record, token_loss_T=token_loss_T(record)) for record in records]


def _has_own_predictions(record: LayerRecord, batch: Batch) -> bool:
    """Return whether each token of a layer has its own prediction: not in an encoder, whose decoder predicts."""
    return record.layer.half != "encoder" and record.routing.num_tokens == len(batch.domain_B) * batch.num_predictions


def _count_BP(batch: Batch) -> Tensor:
    return torch.ones_like(batch.weight_BP) if batch.count_BP is None else batch.count_BP


def compute_objective(
    loss_BP: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
    normalizer: LossNormalizer | None = None,
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it.

    `records`: with the loss of each token (`add_token_loss`). `normalizer`: None: the batch is its whole step. What
    routers learn from the task loss is "objective" among the weighted parts: a sum over layers, since it is the
    gradient of one loss.
    """
    normalizer = normalizer or LossNormalizer.of_single_batch(batch)
    task = normalizer.mean(loss_BP, batch)
    per_layer = compute_losses_of_layers([layer.router for layer in layers], records, coefficients)
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    means = []
    for layer, record in zip(layers, records, strict=True):
        objective_T = check_objective(layer.router, record)
        if objective_T is not None:
            has_own = _has_own_predictions(record, batch)
            means.append(normalizer.mean_over_tokens(objective_T, batch, own_predictions=has_own))
    if means:
        weighted["objective"] = torch.stack(means).sum()
    return Objective(total=task + sum(weighted.values()), task=task, raw=raw, weighted=weighted)


def average_passes(objectives: Sequence[Objective]) -> Objective:
    """Return the mean over several forward passes of one batch."""
    if len(objectives) == 1:
        return objectives[0]
    return Objective(
        total=torch.stack([each.total for each in objectives]).mean(),
        task=torch.stack([each.task for each in objectives]).mean(),
        raw=_average([each.raw for each in objectives]),
        weighted=_average([each.weighted for each in objectives]),
    )


def average_objectives(objectives: Sequence[Objective], ranks: Ranks) -> dict[str, float]:
    """Return the parts of a step's loss under the names of the journal: mean over micro-batches and processes."""
    names = list(objectives[0].parts())
    values = torch.stack([torch.stack([part.parts()[name] for name in names]) for part in objectives]).mean(0)
    summed: list[float] = (ranks.sum(values.double()) / ranks.size).tolist()
    return dict(zip(names, summed, strict=True))


def _average(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
