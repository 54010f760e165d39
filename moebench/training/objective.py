"""What is minimised: the task loss plus coefficient times raw auxiliary loss, each kept apart for the log."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.routing.losses import LOSSES
from moebench.routing.ranks import Ranks
from moebench.routing.values import LayerRecord
from moebench.tasks.task import Batch, Task


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

    @classmethod
    def whole(cls, batch: Batch) -> "Share":
        """Return the share of a batch that is its whole step."""
        counted = (
            max(batch.input_BL.shape[:2].numel(), 1) if batch.valid_BL is None else batch.valid_BL.sum().clamp(min=1)
        )
        return cls(num_positions=counted)

    def mean(self, value_T: Tensor, batch: Batch) -> Tensor:
        """Return the batch's share of the mean over positions, padding left out."""
        counted_T = value_T if batch.valid_BL is None else value_T[batch.valid_BL.reshape(-1)]
        return counted_T.sum() / self.num_positions * self.factor


def judged(records: Sequence[LayerRecord], token_loss_BL: Tensor) -> list[LayerRecord]:
    """Return the records with the task loss of each token: what routers that learn by reinforcement learn from."""
    token_loss_T = token_loss_BL.detach().reshape(-1)
    return [replace(record, token_loss_T=token_loss_T) for record in records]


def objective(
    token_loss_BL: Tensor,
    batch: Batch,
    layers: Sequence[MoELayer],
    records: Sequence[LayerRecord],
    coefficients: Mapping[str, float],
    share: Share | None = None,
) -> Objective:
    """Add up the loss of a batch; a coefficient of 0 measures a loss without using it.

    `records`: judged; `share`: the batch's share of its step; None: it is the whole step. What routers learn from the
    task loss is "objective" among the weighted parts: a sum over layers, since it is the gradient of one loss.
    """
    share = share or Share.whole(batch)
    task = share.mean(token_loss_BL.reshape(-1), batch)
    per_layer = [_raw_losses(layer, record, coefficients) for layer, record in zip(layers, records, strict=True)]
    names = per_layer[0] if per_layer else {}
    raw = {name: torch.stack([losses[name] for losses in per_layer]).mean() for name in names}
    weighted = {name: coefficients[name] * value for name, value in raw.items()}
    learned = [layer.router.objective(record) for layer, record in zip(layers, records, strict=True)]
    learned_T = [value_T for value_T in learned if value_T is not None]
    if learned_T:
        weighted["objective"] = share.mean(torch.stack(learned_T).sum(0), batch)
    return Objective(total=task + sum(weighted.values()), task=task, raw=raw, weighted=weighted)


def agreeing(
    found: Sequence[Objective],
    outputs: Sequence[Tensor],
    task: Task,
    batch: Batch,
    coefficient: float,
    share: Share | None = None,
) -> Objective:
    """Return the mean of what two passes over a batch found, with the raw loss "consistency" beside the others."""
    first, second = (task.log_probabilities(output) for output in outputs)
    apart = (share or Share.whole(batch)).mean(divergence(first, second).reshape(-1), batch)
    return Objective(
        total=torch.stack([each.total for each in found]).mean() + coefficient * apart,
        task=torch.stack([each.task for each in found]).mean(),
        raw=_mean([each.raw for each in found]) | {"consistency": apart},
        weighted=_mean([each.weighted for each in found]) | {"consistency": coefficient * apart},
    )


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return ½ Σ (p - q)(log p - log q) over the last dimension, in nats: symmetric, 0 where both say the same."""
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)


def mean_of(objectives: Sequence[Objective], ranks: Ranks) -> dict[str, float]:
    """Return the parts of a step's loss under the names of the journal: mean over micro-batches and processes."""
    names = list(objectives[0].parts())
    values = torch.stack([torch.stack([part.parts()[name] for name in names]) for part in objectives]).mean(0)
    summed: list[float] = (ranks.sum(values.double()) / ranks.size).tolist()
    return dict(zip(names, summed, strict=True))


def _mean(losses: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in losses]).mean() for name in losses[0]}


def _raw_losses(layer: MoELayer, record: LayerRecord, coefficients: Mapping[str, float]) -> dict[str, Tensor]:
    own = layer.router.losses(record)
    return {name: own[name] if name in own else LOSSES.get(name).item(record) for name in coefficients}
