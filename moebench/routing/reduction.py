"""Sums over processes inside losses: the losses of all layers share one exchange.

A loss gives the sums and means that it needs, and the formula that it computes from them, to `reduce_record`. In
training on several processes the result is a `PendingLoss`, and `resolve_losses` exchanges the sums of many at once.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias, Union

import torch
from torch import Tensor

from moebench.ranks import Ranks, sum_together

if TYPE_CHECKING:
    from moebench.routing.values import LayerRecord

LossValue: TypeAlias = Union[Tensor, "PendingLoss"]
"""A loss, or one that still waits for sums over processes."""


@dataclass(frozen=True, eq=False)
class PendingLoss:
    """A loss that is a function of sums over the tokens of all processes."""

    terms: tuple[Tensor, ...]
    """Sums over the tokens of this process."""
    formula: Callable[..., LossValue]
    """The terms, summed over processes, to the loss; another `PendingLoss` if it depends on further sums."""


def reduce_record(
    record: "LayerRecord",
    formula: Callable[..., LossValue],
    *,
    totals: Sequence[Tensor] = (),
    means: Sequence[Tensor] = (),
) -> LossValue:
    """Return formula(*totals, *means), with totals and means over the tokens of all processes (`record.ranks`).

    `totals`: sums over the tokens of this process. `means`: values by token, [T, ...]; padding is left out.
    """
    if not record.defers_sums:
        return formula(*[record.total(value) for value in totals], *[record.mean(value_T) for value_T in means])
    shapes = [value_T.shape[1:] for value_T in means]

    def resume(*summed: Tensor) -> LossValue:
        sums, counted = summed[: len(totals)], summed[len(totals) :]
        return formula(*sums, *map(divide_by_count, counted, shapes))

    return PendingLoss((*totals, *[sum_with_count(value_T, record.valid_T) for value_T in means]), resume)


def sum_with_count(value_T: Tensor, valid_T: Tensor | None) -> Tensor:
    """Return the sum over tokens, without padding, as a vector whose last element is the number of tokens."""
    if valid_T is None:
        num_tokens = torch.full((1,), value_T.shape[0], dtype=value_T.dtype, device=value_T.device)
    else:
        mask_T = valid_T.to(value_T.dtype).view(-1, *[1] * (value_T.dim() - 1))
        value_T, num_tokens = value_T * mask_T, mask_T.sum().view(1)
    return torch.cat([value_T.sum(0).reshape(-1), num_tokens])


def divide_by_count(summed: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the mean of a vector from `sum_with_count`; 0 for no tokens at all."""
    return (summed[:-1] / summed[-1].clamp(min=1)).view(torch.Size(shape))


def average_losses(losses: Sequence[LossValue]) -> LossValue:
    """Return the mean of several losses."""
    terms = [loss.terms if isinstance(loss, PendingLoss) else () for loss in losses]
    if not any(terms):
        return torch.stack([loss for loss in losses if isinstance(loss, Tensor)]).mean()

    def resume(*summed: Tensor) -> LossValue:
        values = iter(summed)
        return average_losses([_resume(loss, values) for loss in losses])

    return PendingLoss(tuple(term for of_loss in terms for term in of_loss), resume)


def resolve_losses(losses: Sequence[LossValue], ranks: Ranks) -> list[Tensor]:
    """Return the values of losses, with one exchange for all; two if there is a loss that needs a second one."""
    terms = [term for loss in losses if isinstance(loss, PendingLoss) for term in loss.terms]
    if not terms:
        return [loss for loss in losses if isinstance(loss, Tensor)]
    summed = iter(sum_together(terms, ranks))
    return resolve_losses([_resume(loss, summed) for loss in losses], ranks)


def _resume(loss: LossValue, summed: Iterator[Tensor]) -> LossValue:
    return loss.formula(*islice(summed, len(loss.terms))) if isinstance(loss, PendingLoss) else loss
