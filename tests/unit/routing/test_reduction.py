"""Sums over processes inside losses: how many exchanges they take, and that their values stay the same."""

from dataclasses import dataclass, field, replace

import pytest
import torch
from support.cases import Case, Tokens, run
from torch import Tensor

from moebench.ranks import SingleRank, sum_together
from moebench.routing.layer_losses import compute_losses_of_layers
from moebench.routing.reduction import PendingLoss, average_losses, reduce_record, resolve_losses
from moebench.routing.values import LayerRecord


@dataclass(frozen=True)
class EqualRanks(SingleRank):
    """Two ranks that hold the same tokens, and what they exchange."""

    size: int = 2
    exchanges: list[int] = field(default_factory=list)
    """Elements of each exchange."""

    def sum(self, value: Tensor) -> Tensor:
        self.exchanges.append(value.numel())
        return 2 * value


def records_on(ranks: EqualRanks, router: str, layers: int) -> tuple[list, list[LayerRecord]]:
    built = [Case(router).layer() for _ in range(layers)]
    records = [run(layer, Tokens.draw(8, seed=seed), training=True)[1] for seed, layer in enumerate(built)]
    return [layer.router for layer in built], [replace(record, ranks=ranks) for record in records]


NAMES = ("load_balance", "z", "importance", "global_entropy", "local_entropy", "mutual_information", "sequence_balance")


def test_all_losses_of_all_layers_take_one_exchange() -> None:
    ranks = EqualRanks()
    routers, records = records_on(ranks, "top_k", layers=3)
    losses = compute_losses_of_layers(routers, records, NAMES)
    assert len(ranks.exchanges) == 1
    alone = compute_losses_of_layers(routers, [replace(record, ranks=SingleRank()) for record in records], NAMES)
    for ours, theirs in zip(losses, alone, strict=True):
        for name in NAMES:  # twice the same tokens have the same shares, means and variations
            assert ours[name].item() == pytest.approx(theirs[name].item(), rel=1e-6), name


def test_a_loss_of_a_sum_of_a_sum_takes_two_exchanges() -> None:
    ranks = EqualRanks()
    routers, records = records_on(ranks, "stable_moe", layers=2)
    losses = compute_losses_of_layers(routers, records, ("balance", "distillation"))
    assert len(ranks.exchanges) == 2
    alone = compute_losses_of_layers(
        routers, [replace(record, ranks=SingleRank()) for record in records], ("balance", "distillation")
    )
    assert losses[0]["balance"].item() == pytest.approx(alone[0]["balance"].item(), rel=1e-6)


def test_mean_of_pending_losses() -> None:
    ranks = EqualRanks()
    _, (record,) = records_on(ranks, "top_k", layers=1)
    record = replace(record, defers_sums=True)
    pending = [reduce_record(record, lambda total: total + 1, totals=[torch.tensor(x)]) for x in (1.0, 2.0)]
    mean = average_losses([*pending, torch.tensor(4.0)])
    assert isinstance(mean, PendingLoss)
    (value,) = resolve_losses([mean], ranks)
    assert value.item() == (3 + 5 + 4) / 3  # sums are doubled by the second rank
    assert ranks.exchanges == [2]


def test_counts_above_the_precision_of_fp32_are_exact() -> None:
    values = [torch.tensor([2**24 + 1, 3]), torch.tensor(0.1), torch.tensor([[1.0, 2.0]])]
    ranks = EqualRanks()
    counts, scalar, table = sum_together(values, ranks)
    assert counts.tolist() == [2**25 + 2, 6]
    assert counts.dtype == torch.int64
    assert scalar.item() == torch.tensor(0.2).item()
    assert table.tolist() == [[2.0, 4.0]]
    assert ranks.exchanges == [5]
