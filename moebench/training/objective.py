"""What is minimised: the task loss plus coefficient times raw auxiliary loss, each kept apart for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.ranks import Ranks
from moebench.routing.losses import compute_raw_losses
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch, Task


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of one batch and its parts."""

    total: Tensor
    """What is differentiated."""
    task: Tensor
    """Loss per prediction in nats, without any auxiliary loss: the mean over a step's micro-batches and processes is
    that over all its predictions."""
    raw: Mapping[str, Tensor]
    """Auxiliary losses before their coefficient, mean over MoE layers."""
    weighted: Mapping[str, Tensor]
    """The same times their coefficient, as they enter the total."""

    def detached(self) -> "Objective":
        """Return the numbers without what is needed to differentiate them."""
        return Objective(
            total=self.total.detach(),
            task=self.task.detach(),
            raw={name: value.detach() for name, value in self.raw.items()},
            weighted={name: value.detach() for name, value in self.weighted.items()},
        )

    def plus(self, name: str, raw: Tensor, coefficient: float) -> "Objective":
        """Return the loss with one more part."""
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
class Share:
    """What makes the mean over micro-batches and processes of their losses the mean over a step's predictions."""

    num_predictions: int | Tensor
    """Sum of `Batch.count_BP` over the whole step, all its micro-batches and processes."""
    factor: int = 1
    """Micro-batches times processes."""

    @classmethod
    def whole(cls, batch: Batch) -> "Share":
        """Return the share of a batch that is its whole step."""
        return cls(num_predictions=_count_BP(batch).sum().clamp(min=1))

    def mean(self, value_BP: Tensor, batch: Batch) -> Tensor:
        """Return the batch's share of the mean over predictions."""
        if batch.count_BP is not None:
            value_BP = value_BP.where(batch.count_BP > 0, 0.0)
        return value_BP.sum() / self.num_predictions * self.factor

    def mean_over_tokens(self, value_T: Tensor, batch: Batch, *, own_predictions: bool) -> Tensor:
        """Return the same for numbers of tokens; without predictions of their own, a sequence counts by their mean."""
        value_BL = value_T.view(len(batch.domain_B), -1)
        if own_predictions:
            return self.mean(value_BL, batch)
        valid_BL = torch.ones_like(value_BL) if batch.valid_BL is None else batch.valid_BL.to(value_BL.dtype)
        mean_B = (value_BL * valid_BL).sum(1) / valid_BL.sum(1).clamp(min=1)
        return (mean_B * _count_BP(batch).sum(1)).sum() / self.num_predictions * self.factor


def add_token_loss(records: Sequence[LayerRecord], loss_BP: Tensor, batch: Batch) -> list[LayerRecord]:
    """Return the records with the task loss of each token: what routers that learn by reinforcement learn from.

    It is that of the token's own prediction, 0 where nothing is predicted; or the mean of its sequence's predictions,
    where there are not as many of them as tokens.
    """
    loss_BP, count_BP = loss_BP.detach(), _count_BP(batch)
    loss_BP = loss_BP.where(count_BP > 0, 0.0)
    mean_B1 = loss_BP.sum(1, keepdim=True) / count_BP.sum(1, keepdim=True).clamp(min=1)

    def of_tokens(record: LayerRecord) -> Tensor:
        length = record.routing.num_tokens // max(len(batch.domain_B), 1)
        return (loss_BP if _has_own_predictions(record, batch) else mean_B1.expand(-1, length)).reshape(-1)

    return [replace(record, token_loss_T=of_tokens(record)) for record in records]


def _has_own_predictions(record: LayerRecord, batch: Batch) -> bool:
    """Whether each token of a layer has a prediction of its own: not in an encoder, whose decoder predicts."""
    return record.layer.half != "encoder" and record.routing.num_tokens == len(batch.domain_B) * batch.num_predictions


def _count_BP(batch: Batch) -> Tensor:
    return torch.ones_like(batch.weight_BP) if batch.count_BP is None else batch.count_BP


def objective(
    loss_BP: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
    share: LossNormalizer | None = None,
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it.

    `records`: judged; `share`: the batch's share of its step; None: it is the whole step. What routers learn from the
    task loss is "objective" among the weighted parts: a sum over layers, since it is the gradient of one loss.
    """
    share = share or LossNormalizer.of_single_batch(batch)
    task = share.mean(loss_BP, batch)
    per_layer = [
        compute_raw_losses(layer.router, record, coefficients) for layer, record in zip(layers, records, strict=True)
    ]
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    means = []
    for layer, record in zip(layers, records, strict=True):
        learned_T = layer.router.objective(record)
        if learned_T is not None:
            own = _has_own_predictions(record, batch)
            means.append(share.mean_over_tokens(learned_T, batch, own_predictions=own))
    if means:
        weighted["objective"] = torch.stack(means).sum()
    return Objective(total=task + sum(weighted.values()), task=task, raw=raw, weighted=weighted)


def agreeing(
    found: Sequence[Objective],
    outputs: Sequence[Tensor],
    task: Task,
    batch: Batch,
    coefficient: float,
    share: LossNormalizer | None = None,
) -> Objective:
    """Return the mean of what two passes over a batch found, with the raw loss "consistency" beside the others."""
    apart_BL = divergence(*(task.log_probabilities(output) for output in outputs))
    own = apart_BL.shape[1] == batch.num_predictions
    apart = (share or LossNormalizer.of_single_batch(batch)).mean_over_tokens(
        apart_BL.reshape(-1), batch, own_predictions=own
    )
    return Objective(
        total=torch.stack([each.total for each in found]).mean() + coefficient * apart,
        task=torch.stack([each.task for each in found]).mean(),
        raw=_mean([each.raw for each in found]) | {"consistency": apart},
        weighted=_mean([each.weighted for each in found]) | {"consistency": coefficient * apart},
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ½ Σ (p - q)(log p - log q) over the last dimension, in nats: symmetric, 0 where both say the same."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def average_objectives(objectives: Sequence[Objective], ranks: Ranks) -> dict[str, float]:
    """Return the parts of a step's loss under the names of the journal: mean over micro-batches and processes."""
    names = list(objectives[0].parts())
    values = torch.stack([torch.stack([part.parts()[name] for name in names]) for part in objectives]).mean(0)
    summed: list[float] = (ranks.sum(values.double()) / ranks.size).tolist()
    return dict(zip(names, summed, strict=True))


def _mean(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}
