"""The state of parameters that have had no gradient: all zeros, as their first gradient would find it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moebench.parallel.optimizer_state import complete_state
from moebench.routing.linear_map import INPUT_FIRST, LinearMap
from moebench.training.optimizer.muon import Muon


def build(kind: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Return two matrices and an optimizer of them."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4, generator=generator)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": parameters, "uses_muon": kind == "muon"}]
    if kind == "muon":
        maps: dict[Tensor, LinearMap] = dict.fromkeys(parameters, INPUT_FIRST)
        return parameters, Muon(groups, maps, momentum=0.9, scaling="original", lr=0.1, weight_decay=0.1)
    return parameters, torch.optim.AdamW([{"params": parameters}], lr=0.1, weight_decay=0.1)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_is_complete_and_updates_stay_the_same(kind: str) -> None:
    ended: list[tuple[list[nn.Parameter], dict[str, Tensor]]] = []
    for is_completed in (False, True):
        parameters, optimizer = build(kind)
        generator = torch.Generator().manual_seed(1)
        for step in range(4):
            gradients = [torch.randn(3, 4, generator=generator) for _ in parameters]
            parameters[0].grad, parameters[1].grad = gradients[0], gradients[1] if step >= 2 else None
            optimizer.step()
            if is_completed:
                before = [parameter.detach().clone() for parameter in parameters]
                complete_state(optimizer, optimizer.step)
                assert [*map(len, (optimizer.state[parameter] for parameter in parameters))] == [len(ended[0][1])] * 2
                assert all(map(torch.equal, before, parameters))
                assert parameters[0].grad is gradients[0]
                assert optimizer.param_groups[0]["lr"] == 0.1
        ended.append((parameters, optimizer.state[parameters[1]]))
    assert all(map(torch.equal, ended[0][0], ended[1][0]))
    assert ended[0][1].keys() == ended[1][1].keys()
    assert all(torch.equal(ended[0][1][key], ended[1][1][key]) for key in ended[0][1])
