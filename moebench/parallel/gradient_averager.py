"""Averages gradients over processes while the backward pass still computes others.

Gradients are summed in buckets that are fixed from the start, in the order in which a backward pass reaches them. A
resumed run thus sums in the same order as an uninterrupted one, bit for bit, and no graph is searched in each step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moebench.experts.bank import is_sharded, local_shard
from moebench.parallel.mesh import Mesh
from moebench.routing.constants import build_constant_like

BUCKET_BYTES = 25 * 2**20
"""Gradients are sent together up to this size; a larger one by itself."""


@dataclass(eq=False)
class Bucket:
    """Parameters whose gradients are summed by one all-reduce."""

    parameters: list[nn.Parameter]
    group: dist.ProcessGroup
    num_missing: int = 0
    """Gradients that the backward pass has not reached."""
    flat: Tensor | None = None
    """The gradients in flight."""
    work: Any = field(default=None, repr=False)

    @property
    def is_of_experts(self) -> bool:
        """Whether the parameters are shards of experts."""
        return is_sharded(self.parameters[0])

    def send(self, num_processes: int) -> None:
        """Start to sum the gradients; those of replicated parameters with a flag for each that has one."""
        grads = [_local_gradient(parameter) for parameter in self.parameters]
        if self.is_of_experts and len(grads) == 1 and grads[0] is not None and grads[0].is_contiguous():
            self.flat = grads[0].view(-1)  # summed in place
        else:
            filled = [
                torch.zeros_like(local_shard(parameter.detach())) if grad is None else grad
                for parameter, grad in zip(self.parameters, grads, strict=True)
            ]
            flags = [] if self.is_of_experts else [build_constant_like([grad is not None for grad in grads], filled[0])]
            self.flat = torch.cat([*[grad.reshape(-1) for grad in filled], *flags])
        if not self.is_of_experts:
            self.flat.div_(num_processes)
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)

    def receive(self) -> None:
        """Wait for the sums and write them to the gradients; what no process used has none."""
        assert self.flat is not None
        self.work.wait()
        flat, self.flat, self.work = self.flat, None, None
        lengths = [local_shard(parameter.detach()).numel() for parameter in self.parameters]
        grads = [_local_gradient(parameter) for parameter in self.parameters]
        parts = torch.split(flat, [*lengths, flat.numel() - sum(lengths)])
        is_used = [True] * len(grads)
        if not self.is_of_experts and any(grad is None for grad in grads):  # else a GPU need not be waited for
            is_used = [share > 0 for share in parts[-1].tolist()]
        for parameter, grad, part, used in zip(self.parameters, grads, parts, is_used, strict=False):
            if grad is None and used:
                parameter.grad = torch.zeros_like(parameter)
                grad = local_shard(parameter.grad)
            if grad is not None and grad.data_ptr() != part.data_ptr():
                grad.copy_(part.view_as(grad))


def _local_gradient(parameter: nn.Parameter) -> Tensor | None:
    return None if parameter.grad is None else local_shard(parameter.grad)


class GradientAverager:
    """Averages the gradients of all parameters in the backward passes between `start` and `finish`.

    Those of replicated parameters over all processes. The backward pass leaves the sum over a row of the mesh in the
    gradient of a shard of experts: the sums of the other rows are added, and the total is divided by the number of
    processes, not by the number of copies.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: Mesh) -> None:
        """`parameters`: in the order of the forward pass."""
        self.mesh = mesh
        trained = [parameter for parameter in reversed(parameters) if parameter.requires_grad]
        experts = [parameter for parameter, flag in zip(trained, map(is_sharded, trained), strict=True) if flag]
        replicated = [parameter for parameter in trained if not is_sharded(parameter)]
        self.experts = experts
        world = dist.group.WORLD
        assert world is not None
        self.buckets = list(_fill_buckets(replicated, world))
        if mesh.replica_group is not None and mesh.config.data > 1:
            self.buckets += _fill_buckets(experts, mesh.replica_group)
        self.is_active = False
        self.hooks: list[Any] = []
        for bucket in self.buckets:
            for parameter in bucket.parameters:
                hook = self._make_hook(bucket)
                self.hooks.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        for parameter in replicated:  # equal weights are drawn on each process, but processors round differently
            dist.broadcast(parameter.detach(), 0)

    def start(self) -> None:
        """Send gradients in the backward pass that follows."""
        self.is_active = True
        for bucket in self.buckets:
            bucket.num_missing = len(bucket.parameters)

    def finish(self) -> None:
        """Wait for the averages of all gradients."""
        if not self.is_active:
            return
        self.is_active = False
        for bucket in self.buckets:
            if bucket.flat is None:
                bucket.send(self.mesh.size)
        for bucket in self.buckets:
            bucket.receive()
        expert_grads = []
        for parameter in self.experts:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            expert_grads.append(local_shard(parameter.grad))
        if expert_grads:
            torch._foreach_div_(expert_grads, self.mesh.size)

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self.hooks:
            hook.remove()

    def _make_hook(self, bucket: Bucket) -> Any:
        def count_gradient(parameter: Tensor) -> None:
            if self.is_active:
                bucket.num_missing -= 1
                self._send_complete_buckets(bucket.group)

        return count_gradient

    def _send_complete_buckets(self, group: dist.ProcessGroup) -> None:
        """Send what is complete, in the order of buckets: all processes must call the group in the same order."""
        for bucket in self.buckets:
            if bucket.group is group and bucket.flat is None:
                if bucket.num_missing > 0:
                    return
                bucket.send(self.mesh.size)


def _fill_buckets(parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> Iterator[Bucket]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        local = local_shard(parameter.detach())
        if bucket and (size + local.nbytes > BUCKET_BYTES or local.dtype != bucket[0].dtype):
            yield Bucket(bucket, group)
            bucket, size = [], 0
        bucket.append(parameter)
        size += local.nbytes
    if bucket:
        yield Bucket(bucket, group)
