"""What is minimised: the task loss plus coefficient times raw auxiliary loss, each kept apart for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.routing.losses import LOSSES
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of one batch and its parts."""

    total: Tensor
    """What is differentiated."""
    task: Tensor
    """Mean loss per position in nats, without any auxiliary loss."""
    raw: Mapping[str, Tensor]
    """Auxiliary losses before their coefficient, mean over MoE layers."""
    weighted: Mapping[str, Tensor]
    """The same times their coefficient, as they enter the total."""

    def to_log(self) -> dict[str, float]:
        """Return the parts under the names of the journal."""
        parts = {"loss/task": self.task, "loss/total": self.total}
        parts |= {f"loss/{name}": value for name, value in self.weighted.items()}
        parts |= {f"balance/{name}": value for name, value in self.raw.items()}
        return {name: float(value.detach()) for name, value in parts.items()}


def objective(
    token_loss_BL: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it."""
    token_loss_T = token_loss_BL.reshape(-1)
    task = token_loss_T.mean() if batch.valid_BL is None else token_loss_T[batch.valid_BL.reshape(-1)].mean()
    per_layer = [_raw_losses(layer, record, coefficients) for layer, record in zip(layers, records, strict=True)]
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    total = task + sum(weighted.values())
    for layer, record in zip(layers, records, strict=True):
        learned = layer.router.objective(record, token_loss_T.detach())
        if learned is not None:
            total = total + learned
    return Objective(total=total, task=task, raw=raw, weighted=weighted)


def _raw_losses(layer: MoELayer, record: LayerRecord, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    own = layer.router.losses(record)
    return {name: own[name] if name in own else LOSSES.get(name).item(record) for name in coefficients}
