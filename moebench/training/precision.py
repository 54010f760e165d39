"""TF32: products of fp32 matrices on the tensor cores of a GPU, and what stays exact."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from moebench.routing.router import Router
from moebench.schema import TrainConfig

EXACT, TF32 = "highest", "high"
"""Settings of `torch.set_float32_matmul_precision`."""


@contextlib.contextmanager
def matrix_precision(train: TrainConfig, device: torch.device) -> Iterator[None]:
    """Compute products of fp32 matrices on a GPU in TF32 where `train.tf32` says so; restore the setting afterwards."""
    if not train.tf32 or device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(TF32)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def keep_routing_exact(model: nn.Module) -> None:
    """Let every router of a model compute in fp32 whatever the setting; the gradients of gates follow the setting."""
    for module in model.modules():
        if isinstance(module, Router):
            _ExactProducts().surround(module)


class _ExactProducts:
    """Hooks around the forward pass of a module."""

    def __init__(self) -> None:
        self._before: list[str] = []

    def surround(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._begin)
        module.register_forward_hook(self._end, always_call=True)

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        self._before.append(torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision(EXACT)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        torch.set_float32_matmul_precision(self._before.pop())
