"""Which part of each parameter a process updates, when processes with equal copies share the work of the optimizer.

As in ZeRO, stage 1 (arXiv:1910.02054): each process keeps the optimizer's state of its part alone, updates that part,
and receives the other parts after the update. Gradients and parameters stay complete on every process.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from moebench.experts.bank import is_sharded, local_shard
from moebench.parallel.mesh import Mesh

MAX_GATHERED_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}
"""Device -> elements that one all-gather collects from all processes: the workspace of an update. A GPU has memory for
messages that are large enough for its network."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReplicaGroup:
    """Processes with equal copies of a parameter: all of them, or for a shard of experts a column of the mesh."""

    group: dist.ProcessGroup
    device_mesh: DeviceMesh
    """Mesh of all processes; its last dimension is that of the copies."""

    @property
    def size(self) -> int:
        """Number of copies."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """Index of the copy on this process."""
        return self.group.rank()


@dataclass(frozen=True, kw_only=True, eq=False)
class ParameterShard:
    """The part of a parameter that this process updates."""

    parameter: nn.Parameter
    copies: ReplicaGroup
    dim: int | None
    """Dimension along which the copies divide the parameter as torch.chunk does; None: one copy updates all of it."""
    owner: int = 0
    """Copy that updates the parameter, if it is not divided."""
    updated: nn.Parameter | None = field(init=False)
    """What the optimizer updates: a view of the parameter, or a copy where a view has gaps; None: nothing."""

    def __post_init__(self) -> None:
        """Create the parameter of the optimizer."""
        part = self.select_part(self.copy_on_process, self.copies.rank)
        updated = nn.Parameter(part.contiguous()) if part.numel() else None
        object.__setattr__(self, "updated", updated)

    @property
    def copy_on_process(self) -> Tensor:
        """The copy of the parameter on this process, without gradient."""
        return local_shard(self.parameter.detach())

    def select_part(self, tensor: Tensor, rank: int) -> Tensor:
        """Return the part of a tensor of the parameter's shape that copy `rank` updates, as a view."""
        if self.dim is None:
            return tensor if rank == self.owner else tensor.new_empty(0)
        length = -(-tensor.shape[self.dim] // self.copies.size)
        start = min(rank * length, tensor.shape[self.dim])
        return tensor.narrow(self.dim, start, min(length, tensor.shape[self.dim] - start))

    @torch.no_grad()
    def read_parameter(self) -> None:
        """Give the optimizer the gradient and the weights of its part; without a gradient it makes no update."""
        if self.updated is None:
            return
        gradient = self.parameter.grad
        self.updated.grad = None
        if gradient is not None:
            self.updated.grad = self.select_part(local_shard(gradient), self.copies.rank).contiguous()
        part = self.select_part(self.copy_on_process, self.copies.rank)
        if part.data_ptr() != self.updated.data_ptr():  # a copy: weights may have been loaded since
            self.updated.copy_(part)

    @torch.no_grad()
    def write_parameter(self) -> None:
        """Write the updated part into the copy on this process."""
        if self.updated is not None:
            part = self.select_part(self.copy_on_process, self.copies.rank)
            if part.data_ptr() != self.updated.data_ptr():
                part.copy_(self.updated)

    def to_checkpoint(self, state: Tensor) -> Tensor:
        """Return a tensor of the updated part's shape as a part of the full tensor, sharing its memory."""
        if self.dim is None and not is_sharded(self.parameter):
            return state
        # Here because its import takes as long as half of torch.
        from torch.distributed.tensor import DTensor, Replicate, Shard

        placements: list[Any] = [Shard(self.dim) if self.dim is not None else Replicate()]
        if is_sharded(self.parameter):
            placements.insert(0, Shard(0))
        return DTensor.from_local(
            state,
            self.copies.device_mesh,
            placements,
            run_check=False,
            shape=self.parameter.shape,
            stride=self.parameter.stride(),
        )


def plan_shards(parameters: Sequence[nn.Parameter], has_matrices: Sequence[bool], mesh: Mesh) -> list[ParameterShard]:
    """Divide each parameter among the processes that have copies of it, evenly where its shape allows.

    `has_matrices`: whether the optimizer needs the matrices of a parameter in one piece; a stack of them, [N, ...], is
    divided along N. What cannot be divided is updated by one process, the one with the least so far.
    """
    everywhere, column = _build_copies(mesh)
    num_elements = {id(everywhere): [0] * everywhere.size, id(column): [0] * column.size}
    dims: list[int | None] = []
    for parameter, is_matrix in zip(parameters, has_matrices, strict=True):
        copies = column if is_sharded(parameter) else everywhere
        dims.append(_choose_dim(local_shard(parameter.detach()).shape, copies.size, is_matrix=is_matrix))
    shards: list[ParameterShard | None] = [None] * len(parameters)
    largest_first = sorted(range(len(parameters)), key=lambda index: -parameters[index].numel())
    for index in largest_first:
        parameter = parameters[index]
        copies = column if is_sharded(parameter) else everywhere
        load = num_elements[id(copies)]
        owner = min(range(copies.size), key=load.__getitem__)
        if dims[index] is None:
            load[owner] += parameter.numel()
        shards[index] = ParameterShard(parameter=parameter, copies=copies, dim=dims[index], owner=owner)
    return [shard for shard in shards if shard is not None]


def _build_copies(mesh: Mesh) -> tuple[ReplicaGroup, ReplicaGroup]:
    """Return the copies of replicated parameters, and those of sharded ones."""
    ranks_W = torch.arange(mesh.size)
    world: Any = mesh.world
    kind = mesh.device.type
    everywhere = ReplicaGroup(
        group=world.group,
        device_mesh=DeviceMesh.from_group(world.group, kind, mesh=ranks_W, mesh_dim_names=("data",)),
    )
    if mesh.expert_group is None or mesh.replica_group is None:
        return everywhere, everywhere
    # The experts first: what a row of the mesh shares is divided again among the copies.
    ranks_ED = ranks_W.view(mesh.config.data, mesh.config.expert).T.contiguous()
    device_mesh = DeviceMesh.from_group(
        [mesh.expert_group, mesh.replica_group], kind, mesh=ranks_ED, mesh_dim_names=("expert", "data")
    )
    return everywhere, ReplicaGroup(group=mesh.replica_group, device_mesh=device_mesh)


def _choose_dim(shape: torch.Size, num_copies: int, *, is_matrix: bool) -> int | None:
    if is_matrix:
        return 0 if len(shape) > 2 else None
    return next((dim for dim, size in enumerate(shape) if size % num_copies == 0), None)


@torch.no_grad()
def gather_updates(shards: Sequence[ParameterShard]) -> None:
    """Write the part that each process has updated into the copies of all processes."""
    works = []
    for shard in shards:
        shard.write_parameter()
    for copies in dict.fromkeys(shard.copies for shard in shards):
        if copies.size == 1:
            continue
        of_group = [shard for shard in shards if shard.copies is copies]
        even = [shard for shard in of_group if _is_even(shard)]
        for bucket in _fill_buckets([piece for shard in even for piece in _split_pieces(*_view_parts(shard))]):
            _gather_bucket(bucket, copies)
        for shard in of_group:
            if shard not in even:
                works += _broadcast_parts(shard)
    for work in works:
        work.wait()


def _is_even(shard: ParameterShard) -> bool:
    return shard.dim is not None and shard.copy_on_process.shape[shard.dim] % shard.copies.size == 0


def _view_parts(shard: ParameterShard) -> tuple[Tensor, Tensor]:
    """Return the copy on this process as a view [W, ...] of the parts, and the updated part."""
    assert shard.dim is not None
    assert shard.updated is not None
    parts_W = torch.unflatten(shard.copy_on_process, shard.dim, (shard.copies.size, -1)).movedim(shard.dim, 0)
    return parts_W, shard.updated.detach()


def _split_pieces(parts_W: Tensor, updated: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Split the parts of a parameter into pieces that together have `MAX_GATHERED_ELEMENTS` at most."""
    limit = MAX_GATHERED_ELEMENTS[parts_W.device.type]
    if parts_W.numel() <= limit or not updated.dim():
        yield parts_W, updated
        return
    num_rows = limit * updated.shape[0] // parts_W.numel()
    if num_rows == 0:
        for row, part in enumerate(updated):
            yield from _split_pieces(parts_W[:, row], part)
        return
    yield from zip(torch.split(parts_W, num_rows, dim=1), torch.split(updated, num_rows), strict=True)


def _fill_buckets(pieces: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    bucket: list[tuple[Tensor, Tensor]] = []
    size = 0
    for piece in pieces:
        limit = MAX_GATHERED_ELEMENTS[piece[0].device.type]
        if bucket and (size + piece[0].numel() > limit or piece[0].dtype != bucket[0][0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += piece[0].numel()
    if bucket:
        yield bucket


def _gather_bucket(bucket: Sequence[tuple[Tensor, Tensor]], copies: ReplicaGroup) -> None:
    flat_R = torch.cat([updated.reshape(-1) for _, updated in bucket])
    gathered_WR = flat_R.new_empty(copies.size, flat_R.numel())
    dist.all_gather_into_tensor(gathered_WR.view(-1), flat_R, group=copies.group)
    lengths = [updated.numel() for _, updated in bucket]
    for (parts_W, _), piece_WR in zip(bucket, torch.split(gathered_WR, lengths, dim=1), strict=True):
        parts_W.copy_(piece_WR.view(parts_W.shape))


def _broadcast_parts(shard: ParameterShard) -> list[Any]:
    """Start to send the part of each process to all others."""
    works = []
    for rank in range(shard.copies.size):
        part = shard.select_part(shard.copy_on_process, rank)
        if part.numel():
            works.append(dist.broadcast(part, group_src=rank, group=shard.copies.group, async_op=True))
    return works
