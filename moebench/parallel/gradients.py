"""Gradients across processes: averaging those of sharded experts, and clipping by one global norm."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.parallel.mesh import Mesh


def average_expert_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Average the gradients of sharded experts over all processes, as DDP averages the others.

    The backward pass leaves the sum over a row of the mesh in each gradient. The sums of the other rows are added and
    the total is divided by the number of processes, not by the number of copies.
    """
    grads = []
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # the other processes of the column still wait for its all-reduce
            parameter.grad = torch.zeros_like(parameter)
        assert isinstance(parameter.grad, DTensor)
        grads.append(parameter.grad.to_local())
    if not grads:
        return
    if mesh.config.data > 1:
        flat = torch.cat([grad.flatten() for grad in grads])  # one all-reduce for all of them
        dist.all_reduce(flat, group=mesh.replica_group)
        for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
    torch._foreach_div_(grads, mesh.size)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the gradient by its norm over all parameters, and return the norm before clipping.

    Every parameter counts once, sharded or not; the norm is the same on every process.
    """
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in with_grad if isinstance(parameter, DTensor)]
    replicated = [parameter for parameter in with_grad if not isinstance(parameter, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in replicated if p.grad is not None])
    if sharded:
        shard_norm = torch.nn.utils.get_total_norm([p.grad for p in sharded if p.grad is not None])
        expert_norm = shard_norm.full_tensor() if isinstance(shard_norm, DTensor) else shard_norm
        norm = (norm.square() + expert_norm.square()).sqrt()
    for group in (replicated, sharded):  # separately: a fused kernel takes tensors of one type
        if group:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
