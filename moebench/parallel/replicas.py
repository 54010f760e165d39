"""Replica check: copies of parameters and router state must be equal on all processes, bit for bit."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.parallel.mesh import Mesh

CHUNK_ELEMENTS = 2**21
"""Elements hashed at a time: each needs 16 bytes of workspace, and up to 8 more where it is copied."""
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaError(Exception):
    """Copies of a parameter or of a router's state differ between processes: the training since then is invalid."""


def check_replicas(model: nn.Module, mesh: Mesh) -> None:
    """Raise ReplicaError, on all processes, naming the first tensor whose copies differ and the ranks."""
    if not mesh.process_info.has_group:
        return
    named = [*model.named_parameters(), *model.named_buffers()]
    prints_N2 = torch.stack([fingerprint(_to_local(tensor)) for _, tensor in named])
    prints_WN2 = mesh.world.gather(prints_N2.unsqueeze(0), lengths=(1,) * mesh.size)
    prints_WN2 = prints_WN2.cpu()  # once: each comparison would synchronize a GPU
    for index, (name, tensor) in enumerate(named):
        for group in _replica_groups(tensor, mesh):
            first = prints_WN2[group[0], index]
            differing = [rank for rank in group if not torch.equal(prints_WN2[rank, index], first)]
            if differing:
                ranks = ", ".join(str(rank) for rank in differing)
                raise ReplicaError(f"copies of {name} differ: rank {group[0]} and rank {ranks} hold different bits")


def fingerprint(tensor: Tensor) -> Tensor:
    """Return two int64 numbers that depend on the bits and the position of every element.

    Equal tensors have equal fingerprints, whatever their memory layout.
    """
    sums_2 = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    position = 1
    for chunk in _chunks(tensor.detach()):
        bits = chunk.view(_INTEGER[chunk.element_size()]).long()
        weight = torch.arange(position, position + len(bits), device=bits.device)
        weight.mul_(0x9E3779B1).remainder_(0x7FFFFFFF)
        sums_2 += torch.stack([bits.sum(), weight.mul_(bits).sum()])  # int64 wraps around
        position += len(bits)
    return sums_2


def _chunks(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the elements in order, flat, at most `CHUNK_ELEMENTS` at a time; never copy more than one chunk."""
    if tensor.is_contiguous():
        yield from torch.split(tensor.view(-1), CHUNK_ELEMENTS) if tensor.numel() else ()
    elif tensor.numel() <= CHUNK_ELEMENTS:
        yield tensor.contiguous().view(-1)
    else:
        num_rows = CHUNK_ELEMENTS // tensor[0].numel()
        for part in torch.split(tensor, num_rows) if num_rows else tensor:
            yield from _chunks(part)


def _to_local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _replica_groups(tensor: Tensor, mesh: Mesh) -> Iterator[list[int]]:
    """Yield the groups of ranks that hold equal copies: all ranks, or each column of the mesh for a sharded tensor."""
    data, expert = mesh.config.data, mesh.config.expert
    if not isinstance(tensor, DTensor):
        yield list(range(data * expert))
        return
    for column in range(expert):
        yield [row * expert + column for row in range(data)]
