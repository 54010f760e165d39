"""Stacks of experts; a process may hold a part of them."""

from collections.abc import Mapping

from torch import Tensor

from moebench.experts.bank import is_sharded, local_shard


def copy_experts(stack: Tensor, values: Mapping[int, Tensor]) -> None:
    """Set experts of a stack, in place; a process that holds some of them sets its own."""
    local = local_shard(stack)
    first = local.shape[0] * stack.device_mesh.get_local_rank("expert") if is_sharded(stack) else 0
    for expert, value in values.items():
        if first <= expert < first + local.shape[0]:
            local[expert - first].copy_(value)
