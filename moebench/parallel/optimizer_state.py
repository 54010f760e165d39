"""The state of an optimizer for parameters that have had no gradient yet."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def complete_state(optimizer: torch.optim.Optimizer, step: Callable[[], Any]) -> None:
    """Give every trained parameter the state with which its first gradient would find it: zeros.

    A fresh optimizer has no state, and torch creates that of a parameter at its first gradient. A checkpoint has all,
    so that what a run saves and what it loads have the same tensors. `step`: an update, here one that changes nothing.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    missing = [parameter for parameter in parameters if parameter.requires_grad and not optimizer.state.get(parameter)]
    if not missing:
        return
    gradients = [parameter.grad for parameter in parameters]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = None
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in missing:
        for value in optimizer.state[parameter].values():
            if isinstance(value, Tensor):
                value.zero_()  # the count of updates too
