"""Clipping by one norm of the gradients of all processes."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
