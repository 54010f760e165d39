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
    if not mesh.process_info.has_group:
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    prints = torch.stack([fingerprint(_own(tensor)) for _, tensor in named])
    all_prints = mesh.world.gather(prints.unsqueeze(0)).cpu()  # once: each comparison would wait for a GPU
    for index, (name, tensor) in enumerate(named):
        for group in _groups_of_copies(tensor, mesh):
            odd = [rank for rank in group if not torch.equal(all_prints[rank, index], all_prints[group[0], index])]
            if odd:
                others = ", ".join(str(rank) for rank in odd)
                raise ReplicaError(f"copies of {name} differ: rank {group[0]} and rank {others} hold other bits")


def fingerprint(tensor: Tensor) -> Tensor:
    """Return two int64 numbers that depend on every bit and its place: equal for equal tensors."""
    found = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    place = 1
    for part in _parts(tensor.detach()):
        bits = part.view(_INTEGER[part.element_size()]).long()
        weight = torch.arange(place, place + len(bits), device=bits.device)
        weight.mul_(0x9E3779B1).remainder_(0x7FFFFFFF)
        found += torch.stack([bits.sum(), weight.mul_(bits).sum()])  # int64 wraps around
        place += len(bits)
    return found


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements in their order, flat, at most `PART` at a time; only small parts are ever copied."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), PART) if tensor.numel() else ()
    elif tensor.numel() <= PART:
        yield tensor.contiguous().view(-1)
    else:
        num_rows = PART // tensor[0].numel()
        for part in torch.split(tensor, num_rows) if num_rows else tensor:
            yield from _parts(part)


PART = 2**21
"""Elements compared at a time: each needs 16 bytes beside its own, and up to 8 where it is copied."""
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
