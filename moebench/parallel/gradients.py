"""Gradients of many processes: experts' summed and divided, one norm over everything, clipped alike."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moebench.parallel.mesh import Mesh


def average_expert_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Make the gradients of spread experts the mean over processes of their losses' gradients, as DDP's are.

    After the backward pass each holds the sum over its row of the mesh: the copies in the other rows are added, and
    the sum is divided by the number of processes, not of copies.
    """
    grads = []
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            continue
        if parameter.grad is None:  # it takes part all the same: the others wait for it
            parameter.grad = torch.zeros_like(parameter)
        assert isinstance(parameter.grad, DTensor)
        grads.append(parameter.grad.to_local())
    if not grads:
        return
    if mesh.config.data > 1:
        flat = torch.cat([grad.flatten() for grad in grads])  # one exchange for all
        dist.all_reduce(flat, group=mesh.replica_group)
        for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
            grad.copy_(summed.view_as(grad))
    torch._foreach_div_(grads, mesh.size)


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Clip the norm of the whole gradient, every parameter counted once wherever it lies; return it as it was.

    The norm is the same on every process.
    """
    with_grad = [parameter for parameter in parameters if parameter.grad is not None]
    spread = [parameter for parameter in with_grad if isinstance(parameter, DTensor)]
    copied = [parameter for parameter in with_grad if not isinstance(parameter, DTensor)]
    norm = torch.nn.utils.get_total_norm([p.grad for p in copied if p.grad is not None])
    if spread:
        of_experts = torch.nn.utils.get_total_norm([p.grad for p in spread if p.grad is not None])
        whole = of_experts.full_tensor() if isinstance(of_experts, DTensor) else of_experts
        norm = (norm.square() + whole.square()).sqrt()
    for group in (copied, spread):  # apart: the fused update of a list takes one kind of tensor
        if group:
            torch.nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
