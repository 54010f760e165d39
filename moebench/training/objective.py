"""What is minimised: the task loss plus coefficient times raw auxiliary loss, each kept apart for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.routing.losses import raw_losses
from moebench.routing.ranks import Ranks
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch


@dataclass(frozen=True, kw_only=True, eq=False)
class Objective:
    """The loss of one batch and its parts."""

    total: Tensor
    """What is differentiated."""
    task: Tensor
    """Loss per position in nats, without any auxiliary loss: the mean over a step's micro-batches and processes is
    that over all its positions."""
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
    """What makes the mean over micro-batches and processes of their losses the mean over a step's positions."""

    num_positions: int | Tensor
    """Positions of the whole step that count, padding left out, of all micro-batches and processes."""
    factor: int = 1
    """Micro-batches times processes."""


def objective(
    token_loss_BL: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
    share: Share | None = None,
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it.

    `share`: the batch's share of its step; None: it is the whole step.
    """
    token_loss_T = token_loss_BL.reshape(-1)
    counted_T = token_loss_T if batch.valid_BL is None else token_loss_T[batch.valid_BL.reshape(-1)]
    share = share or Share(num_positions=max(counted_T.numel(), 1))
    task = counted_T.sum() / share.num_positions * share.factor
    per_layer = [raw_losses(layer.router, record, coefficients) for layer, record in zip(layers, records, strict=True)]
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    total = task + sum(weighted.values())
    for layer, record in zip(layers, records, strict=True):
        learned = layer.router.objective(record, token_loss_T.detach())
        if learned is not None:
            total = total + learned
    return Objective(total=total, task=task, raw=raw, weighted=weighted)


def mean_of(objectives: Sequence[Objective], ranks: Ranks) -> dict[str, float]:
    """Return the parts of a step's loss under the names of the journal: mean over micro-batches and processes."""
    names = list(objectives[0].parts())
    values = torch.stack([torch.stack([part.parts()[name] for name in names]) for part in objectives]).mean(0)
    summed: list[float] = (ranks.sum(values.double()) / ranks.size).tolist()
    return dict(zip(names, summed, strict=True))
