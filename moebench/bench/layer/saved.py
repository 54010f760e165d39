"""Bytes that a forward pass keeps for its backward."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def count_saved_bytes(forward: Callable[[], object], excluded: Iterable[Tensor]) -> int:
    """Run a forward pass and return the bytes of the storages it saves for backward, each counted once.

    `excluded` (parameters, the input) do not count. What a custom autograd function keeps outside of
    save_for_backward is not seen.
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    kept: list[Tensor] = []  # alive until the sum: a freed storage's address could be given out again

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del result
    return sum(size for address, size in storages.items() if address not in left_out)


def least_bytes(num_rows: int, d_model: int, hidden: int, *, gated: bool, element_size: int) -> int:
    """Return what any expert layer must keep: each row's input once and its hidden values before the activation."""
    return num_rows * (d_model + hidden * (1 + gated)) * element_size
