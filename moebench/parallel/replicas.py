"""Copies that must be equal: parameters and router state, compared bit by bit."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.parallel.mesh import Mesh


class ReplicaError(Exception):
    """Copies of a parameter or of a router's state differ between processes: what was trained since is worthless."""


def check_replicas(model: nn.Module, mesh: Mesh) -> None:
    """Raise ReplicaError, on all processes, naming the first tensor whose copies differ and the processes."""
    if mesh.size == 1:
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    prints = torch.stack([fingerprint(_own(tensor)) for _, tensor in named])
    all_prints = mesh.world.gather(prints.unsqueeze(0))
    for index, (name, tensor) in enumerate(named):
        for group in _groups_of_copies(tensor, mesh):
            odd = [rank for rank in group if not torch.equal(all_prints[rank, index], all_prints[group[0], index])]
            if odd:
                others = ", ".join(str(rank) for rank in odd)
                raise ReplicaError(f"copies of {name} differ: rank {group[0]} and rank {others} hold other bits")


def fingerprint(tensor: Tensor) -> Tensor:
    """Return two int64 numbers that depend on every bit and its place: equal for equal tensors."""
    flat = tensor.detach().contiguous().flatten()
    if flat.numel() == 0:
        return torch.zeros(2, dtype=torch.int64, device=tensor.device)
    bits = flat.view(_INTEGER[flat.element_size()]).long()
    place = torch.arange(1, len(bits) + 1, device=bits.device)
    return torch.stack([bits.sum(), (bits * (place * 0x9E3779B1 % 0x7FFFFFFF)).sum()])  # int64 wraps around


_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _own(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _groups_of_copies(tensor: Tensor, mesh: Mesh) -> Iterator[list[int]]:
    """Yield the ranks that must hold the same: all, or each column of the mesh."""
    data, expert = mesh.config.data, mesh.config.expert
    if not isinstance(tensor, DTensor):
        yield list(range(data * expert))
        return
    for column in range(expert):
        yield [row * expert + column for row in range(data)]
