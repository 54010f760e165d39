"""Clipping and the check for non-finite values inside the fused update: the device decides, and the host continues."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

SMALLEST_NORM = 1e-6
"""Added to the norm, as `torch.nn.utils.clip_grad_norm_` does."""


def can_clip_in_update(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether fused AdamW updates all parameters, none of them sharded: its kernel scales gradients."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return type(optimizer) is torch.optim.AdamW and not any(isinstance(parameter, DTensor) for parameter in parameters)


@torch.no_grad()
def clip_in_update(
    optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float, loss: Tensor
) -> Tensor:
    """Let the next update scale the gradient to `max_norm` and do nothing where the norm or the loss is not finite.

    Returns the norm before clipping. The kernel divides gradients by `grad_scale` while it reads them, which saves one
    pass over them; with `found_inf` it leaves parameters, moments and the count of updates as they are. These are the
    attributes by which `torch.amp.GradScaler` passes the two.
    """
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    is_finite = norm.isfinite() & loss.isfinite()
    optimizer.grad_scale = ((norm + SMALLEST_NORM) / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    return norm
