"""Router state is updated once per optimizer step from all micro-batches and processes, without padding."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from support.cases import Case, Tokens, run
from torch import Tensor

from moebench.ranks import Scopes, SingleRank
from moebench.routing.router import Router
from moebench.routing.values import LayerRecord


@dataclass(frozen=True)
class TwoEqualRanks(SingleRank):
    """Two ranks that hold the same tokens."""

    size: int = 2

    def sum(self, value: Tensor) -> Tensor:
        return 2 * value


def test_loads_and_sums_add_up_over_micro_batches_and_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def statistics(self: Router, record: LayerRecord) -> dict[str, Tensor]:
        return {"served": (record.routing.experts_per_token_T > 0).sum()}

    calls: list[tuple[Tensor, Mapping[str, Tensor]]] = []
    layer = Case("top_k").layer()
    monkeypatch.setattr(type(layer.router), "statistics", statistics)
    monkeypatch.setattr(
        type(layer.router), "after_step", lambda self, load_E, statistics: calls.append((load_E, statistics))
    )
    valid_T = torch.arange(8) < 5
    records = [run(layer, Tokens.draw(8, seed=seed), training=True)[1] for seed in range(2)]
    records.append(run(layer, replace(Tokens.draw(8, seed=2), valid_T=valid_T), training=True)[1])
    layer.after_step(records)
    layer.scopes = Scopes(world=TwoEqualRanks())
    layer.after_step(records)
    (load_E, single_sums), (double_load_E, double_sums) = calls
    assert load_E.tolist() == sum(record.routing.load_E for record in records).tolist()
    assert int(load_E.sum()) == (8 + 8 + 5) * 2
    assert int(single_sums["served"]) == 8 + 8 + 5
    assert double_load_E.tolist() == (2 * load_E).tolist()
    assert int(double_sums["served"]) == 2 * (8 + 8 + 5)
