"""The values of each MoE layer in one logged step, summed over micro-batches and processes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.experts.layer import MoELayer
from moebench.ranks import Ranks
from moebench.routing.metrics import LoadCount
from moebench.routing.values import LayerRecord
from moebench.runs.layer_series import LayerValues
from moebench.training.executed_cost import Column, ExecutedCost

_NUM_SUMS = 5


@dataclass(frozen=True, kw_only=True)
class LogitSummary:
    """The router logits of one layer."""

    entropy: float | None = None
    """As `LayerValues.entropy`; None for a single expert."""
    largest: float | None = None
    std: float | None = None


def build_layer_values(
    counts: Sequence[LoadCount], cost: ExecutedCost, logits: Sequence[LogitSummary], sequence_length: int
) -> Mapping[str, LayerValues]:
    """Return layer -> its values; counts and cost are those of all processes."""
    values = {}
    for layer, count, sums_X, summary in zip(cost.layers, counts, cost.total_LX.tolist(), logits, strict=True):
        positions = max(sums_X[Column.POSITIONS], 1.0)
        values[str(layer.name)] = LayerValues(
            load=tuple(count.load_E.tolist()),
            tokens=count.num_tokens,
            dropped=count.num_dropped,
            rerouted=count.num_rerouted,
            unserved=count.num_unserved,
            experts_per_token=sums_X[Column.ROWS] / positions,
            flops_per_token=layer.flops_per_token(sequence_length) + sums_X[Column.EXCESS_FLOPS] / positions,
            entropy=summary.entropy,
            logit_max=summary.largest,
            logit_std=summary.std,
        )
    return values


@torch.no_grad()
def summarise_logits(
    layers: Sequence[MoELayer], records: Sequence[Sequence[LayerRecord]], world: Ranks
) -> list[LogitSummary]:
    """Return a summary for each layer over all its records and processes; one exchange for all layers.

    `records`: for each layer those of its micro-batches. Routers without logits of tokens and experts have an empty
    summary.
    """
    rows = [_sum_logits(layer_records) for layer_records in records]
    present = [row for row in rows if row is not None]
    if not present:
        return [LogitSummary() for _ in layers]
    # The largest value of each process has its own columns of the sum, so that one exchange does for both.
    sums_LX = torch.stack([row[0] for row in present])
    largest_LW = sums_LX.new_zeros(len(present), world.size)
    largest_LW[:, world.rank] = torch.stack([row[1] for row in present])
    summed = iter(world.sum(torch.cat([sums_LX, largest_LW], dim=1)).tolist())
    experts = [layer_records[0].routing.load_E.numel() for layer_records in records]
    return [
        LogitSummary() if row is None else _summarise(next(summed), num_experts)
        for row, num_experts in zip(rows, experts, strict=True)
    ]


def _sum_logits(records: Sequence[LayerRecord]) -> tuple[Tensor, Tensor] | None:
    """Return sums over tokens (tokens, their entropy, logits, their sum and sum of squares), and the largest logit."""
    tables = [(record.routing.logits_TE, record.valid_T) for record in records]
    parts = [_sum_table(logits_TE, valid_T) for logits_TE, valid_T in tables if logits_TE is not None]
    if not parts:
        return None
    return torch.stack([sums for sums, _ in parts]).sum(0), torch.stack([largest for _, largest in parts]).amax(0)


def _sum_table(logits_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
    logits_TE = logits_TE.float()
    share_TE = logits_TE.softmax(-1)
    entropy_T = -torch.special.xlogy(share_TE, share_TE).sum(-1)
    counted_T = entropy_T.isfinite() if valid_T is None else entropy_T.isfinite() & valid_T
    # A masked logit is -inf: no value of its own.
    counted_TE = logits_TE.isfinite() & counted_T.unsqueeze(-1)
    value_TE = logits_TE.where(counted_TE, 0.0).double()
    sums = (
        counted_T.sum(),
        entropy_T.where(counted_T, 0.0).sum(),
        counted_TE.sum(),
        value_TE.sum(),
        value_TE.square().sum(),
    )
    smallest = torch.finfo(torch.float32).min
    # Begins with a lowest value, so that the largest of no tokens exists.
    largest = torch.cat([logits_TE.where(counted_TE, smallest).flatten(), logits_TE.new_full((1,), smallest)]).max()
    return torch.stack([value.double() for value in sums]), largest.double()


def _summarise(values: Sequence[float], num_experts: int) -> LogitSummary:
    num_tokens, entropy, num_logits, total, squares = values[:_NUM_SUMS]
    if not num_tokens or not num_logits:
        return LogitSummary()
    mean = total / num_logits
    return LogitSummary(
        entropy=entropy / num_tokens / math.log(num_experts) if num_experts > 1 else None,
        largest=max(values[_NUM_SUMS:]),
        std=math.sqrt(max(squares / num_logits - mean * mean, 0.0)),
    )
