"""What is minimised: the task loss plus coefficient times raw auxiliary loss, each kept apart for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.routing.losses import LOSSES
from moebench.routing.ranks import Ranks
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch


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


def objective(
    loss_BP: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
    share: Share | None = None,
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it.

    `share`: the batch's share of its step; None: it is the whole step.
    """
    if batch.count_BP is not None:
        loss_BP = loss_BP.where(batch.count_BP > 0, 0.0)
    share = share or Share(num_predictions=_count(batch).clamp(min=1))
    task = loss_BP.sum() / share.num_predictions * share.factor
    per_layer = [_raw_losses(layer, record, coefficients) for layer, record in zip(layers, records, strict=True)]
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    total = task + sum(weighted.values())
    for layer, record in zip(layers, records, strict=True):
        learned = layer.router.objective(record, _token_loss(loss_BP.detach(), batch, record))
        if learned is not None:
            total = total + learned
    return Objective(total=total, task=task, raw=raw, weighted=weighted)


def _count(batch: Batch) -> Tensor:
    return torch.tensor(batch.weight_BP.numel()) if batch.count_BP is None else batch.count_BP.sum()


def _token_loss(loss_BP: Tensor, batch: Batch, record: LayerRecord) -> Tensor:
    """Return loss_T of the layer's tokens: each its own prediction's, or where there are fewer its sequence's mean."""
    size, length = loss_BP.shape[0], record.routing.num_tokens // max(loss_BP.shape[0], 1)
    in_encoder = batch.decoder_input_BP is not None and str(record.layer).startswith("encoder.")
    if loss_BP.shape[1] != length or in_encoder:
        count_BP = torch.ones_like(loss_BP) if batch.count_BP is None else batch.count_BP
        loss_BP = (loss_BP.sum(1, keepdim=True) / count_BP.sum(1, keepdim=True).clamp(min=1)).expand(size, length)
    return loss_BP.reshape(-1)


def mean_of(objectives: Sequence[Objective], ranks: Ranks) -> dict[str, float]:
    """Return the parts of a step's loss under the names of the journal: mean over micro-batches and processes."""
    names = list(objectives[0].parts())
    values = torch.stack([torch.stack([part.parts()[name] for name in names]) for part in objectives]).mean(0)
    summed: list[float] = (ranks.sum(values.double()) / ranks.size).tolist()
    return dict(zip(names, summed, strict=True))


def _raw_losses(layer: MoELayer, record: LayerRecord, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    own = layer.router.losses(record)
    return {name: own[name] if name in own else LOSSES.get(name).item(record) for name in coefficients}
