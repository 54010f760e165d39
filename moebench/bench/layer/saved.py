"""Bytes that a forward pass saves for its backward pass."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def count_saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Run a forward pass and return the bytes of the storages it saves for backward, each counted once.

    `excluded` (parameters, the input) do not count. Tensors that a custom autograd function keeps outside of
    save_for_backward are not counted.
    """
    excluded_addresses = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    saved: list[Tensor] = []  # alive until the sum: the address of a freed storage can be reused

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    del output
    return sum(size for address, size in storages.items() if address not in excluded_addresses)


def min_saved_bytes(num_rows: int, d_model: int, hidden: int, *, gated: bool, element_size: int) -> int:
    """Return the bytes that any expert layer must save: each row's input and hidden values before activation."""
    return num_rows * (d_model + hidden * (1 + gated)) * element_size
