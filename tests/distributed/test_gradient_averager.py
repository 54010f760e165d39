"""Gradients are averaged while the backward pass runs, also where a process has not used a parameter."""

from typing import Any

import torch
from support.process_group import Mesh, Shape
from torch import nn

from moebench.parallel import gradient_averager
from moebench.parallel.gradient_averager import GradientAverager


class Gated(nn.Module):
    """Layers of which each process uses others, and one that none uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(5))

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        for index in used:
            x = self.layers[index](x)
        return x.square().mean()


USED = {0: [0, 1, 3], 1: [0, 3, 2]}
"""Rank -> layers in the order in which it uses them; nobody uses the last one."""


def average(mesh: Mesh) -> dict[str, Any]:
    gradient_averager.BUCKET_BYTES = 60  # a matrix has 36 bytes, its bias 12
    torch.manual_seed(mesh.rank)
    module = Gated()  # differs between ranks
    averager = GradientAverager(list(module.parameters()), mesh)
    weights = module.layers[0].weight.detach().clone()
    x = torch.randn(4, 3)
    module(x, USED[mesh.rank]).backward()  # a micro-batch that is not the last one: nothing is sent
    local = {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    averager.start()
    module(x, USED[mesh.rank]).backward()
    averager.finish()
    averaged = {name: p.grad for name, p in module.named_parameters()}
    averager.close()
    module.zero_grad()
    module(x, USED[mesh.rank]).backward()
    again = {name: p.grad for name, p in module.named_parameters()}
    return {"weights": weights, "local": local, "averaged": averaged, "again": again, "buckets": len(averager.buckets)}


def test_average_over_two_processes() -> None:
    first, second = Shape(2, 1).run(average)
    assert first["buckets"] == 5
    assert torch.equal(first["weights"], second["weights"])
    for name, ours in first["local"].items():
        theirs, averaged = second["local"][name], first["averaged"][name]
        if ours is None and theirs is None:
            assert name.startswith("layers.4.")
            assert averaged is None
            continue
        zeros = torch.zeros_like(ours if ours is not None else theirs)
        assert torch.equal(averaged, ((zeros if ours is None else ours) + (zeros if theirs is None else theirs)) / 2)
        assert torch.equal(second["averaged"][name], averaged)
    for name, gradient in first["again"].items():  # after `close`
        assert gradient is None if first["local"][name] is None else torch.equal(gradient, first["local"][name])


def list_sent(mesh: Mesh) -> list[int]:
    """Return the number of buckets in flight whenever the backward pass has reached another layer."""
    gradient_averager.BUCKET_BYTES = 60
    module = Gated()
    averager = GradientAverager(list(module.parameters()), mesh)
    sent: list[int] = []

    def watch(parameter: torch.Tensor) -> None:
        sent.append(sum(bucket.work is not None for bucket in averager.buckets))

    for layer in module.layers:  # after the hooks of the averager, so the bucket of this layer may be in flight
        layer.weight.register_post_accumulate_grad_hook(watch)
    averager.start()
    module(torch.randn(4, 3), [0, 1, 2, 3, 4]).backward()
    averager.finish()
    return sent


def test_buckets_are_sent_while_the_backward_pass_runs() -> None:
    # A layer is a bucket. Each is sent when the gradients of its weight and its bias are there, before the next layer.
    for sent in Shape(2, 1).run(list_sent):
        assert len(sent) == 5
        assert sent == sorted(sent)
        assert all(number >= index for index, number in enumerate(sent)), sent
