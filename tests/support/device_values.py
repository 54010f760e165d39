"""Values on a device, and comparisons of large ones; the host must not wait for the device in between."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """Raise an error where the host waits for the device."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def draw(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator(device).manual_seed(sum(shape))
    return torch.randn(*shape, device=device, generator=generator).to(dtype)


def distance(value: Tensor, exact: Tensor) -> float:
    """Return the norm of the difference over the norm, in parts, because fp64 copies of all rows would not fit."""
    difference = sum(float((a.double() - b.double()).square().sum()) for a, b in zip_chunks(value, exact))
    size = sum(float(b.double().square().sum()) for _, b in zip_chunks(value, exact))
    return float((difference / max(size, 1e-300)) ** 0.5)


def zip_chunks(*values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    assert len({value.shape for value in values}) == 1
    return zip(*(value.split(8192) for value in values), strict=True)
