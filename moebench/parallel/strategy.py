"""Lightning strategies for one process and for many, whose checkpoints are interchangeable."""

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from typing_extensions import override

from moebench.parallel.checkpoint import VerifiedCheckpointIO
from moebench.parallel.gradient_averager import GradientAverager
from moebench.parallel.mesh import Mesh
from moebench.parallel.optimizer_state import complete_state
from moebench.parallel.process_info import ProcessInfo
from moebench.parallel.sharded_optimizer import ShardedOptimizer

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""Optimizer state is keyed by parameter name, so that parameter groups and sharding may change between runs."""


def build_strategy(mesh: Mesh, checkpoint_io: VerifiedCheckpointIO) -> Strategy:
    """Build the strategy that trains a module on a mesh."""
    if not mesh.process_info.has_group:
        return SingleProcessStrategy(device=mesh.device, checkpoint_io=checkpoint_io)
    return MeshStrategy(mesh, checkpoint_io)


class _NamedStateStrategy(Strategy):
    """Passes the tensors of a checkpoint to `checkpoint_io` by name and as they are sharded, and restores them."""

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # `load_checkpoint` needs the optimizer

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False  # `load_checkpoint` does

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module, options=BY_NAME)

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        assert self.lightning_module is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        if isinstance(optimizer, ShardedOptimizer):
            return optimizer.state_by_name(self._parameter_names())
        complete_state(optimizer, optimizer.step)
        return get_optimizer_state_dict(self.lightning_module, optimizer, options=BY_NAME)

    @override
    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)  # on all processes

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        (optimizer,) = self.optimizers
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = {
            "state_dict": self.lightning_module_state_dict(),
            "optimizer_states": [self.optimizer_state(optimizer)],
        }
        checkpoint_io = self.checkpoint_io
        assert isinstance(checkpoint_io, VerifiedCheckpointIO)
        other_state = checkpoint_io.load_into(state, Path(checkpoint_path))
        set_model_state_dict(self.lightning_module, state["state_dict"], options=BY_NAME)
        (values,) = state["optimizer_states"]
        if isinstance(optimizer, ShardedOptimizer):  # its tensors were loaded in place
            optimizer.load_settings(values, self._parameter_names())
        else:
            set_optimizer_state_dict(self.lightning_module, optimizer, optim_state_dict=values, options=BY_NAME)
        return other_state

    def _parameter_names(self) -> dict[Tensor, str]:
        assert self.lightning_module is not None
        return {parameter: name for name, parameter in self.lightning_module.named_parameters()}

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        pass  # `load_checkpoint` has done it

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        pass  # `load_checkpoint` has done it


class SingleProcessStrategy(_NamedStateStrategy, SingleDeviceStrategy):
    """One process on one device."""


class MeshStrategy(_NamedStateStrategy, DDPStrategy):
    """Many processes, each with a part of the batch, whose gradients are averaged by `GradientAverager`."""

    def __init__(self, mesh: Mesh, checkpoint_io: VerifiedCheckpointIO) -> None:
        process_info = mesh.process_info
        on_gpu = mesh.device.type == "cuda"
        super().__init__(
            parallel_devices=[
                torch.device("cuda", n) if on_gpu else mesh.device for n in range(process_info.local_world_size)
            ],
            cluster_environment=MeshEnvironment(process_info),
            checkpoint_io=checkpoint_io,
            timeout=timedelta(seconds=mesh.config.timeout_s),
        )
        self.mesh = mesh
        self.averager: GradientAverager | None = None
        self.is_blocked = False
        """Whether the micro-batch is not the last one of its step."""

    @override
    def configure_ddp(self) -> None:
        # In place of DDP, which searches the graph in each step, or sums in another order after the first one.
        assert self.lightning_module is not None
        self.averager = GradientAverager(list(self.lightning_module.parameters()), self.mesh)

    @override
    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        self.is_blocked = True
        try:
            yield
        finally:
            self.is_blocked = False

    @override
    def pre_backward(self, closure_loss: Tensor) -> None:
        if self.averager is not None and not self.is_blocked:  # only in the last micro-batch of a step
            self.averager.start()

    @override
    def post_backward(self, closure_loss: Tensor) -> None:
        if self.averager is not None:
            self.averager.finish()

    @override
    def teardown(self) -> None:
        if self.averager is not None:
            self.averager.close()
        super().teardown()


class MeshEnvironment(ClusterEnvironment):
    """Ranks of a process group that exists already: lightning starts no processes."""

    def __init__(self, process_info: ProcessInfo) -> None:
        self.process_info = process_info

    @property
    @override
    def creates_processes_externally(self) -> bool:
        return True

    @property
    @override
    def main_address(self) -> str:
        return self.process_info.store_host

    @property
    @override
    def main_port(self) -> int:
        return self.process_info.store_port

    @staticmethod
    @override
    def detect() -> bool:
        return False  # only ever passed explicitly

    @override
    def world_size(self) -> int:
        return self.process_info.world_size

    @override
    def set_world_size(self, size: int) -> None:
        pass

    @override
    def global_rank(self) -> int:
        return self.process_info.rank

    @override
    def set_global_rank(self, rank: int) -> None:
        pass

    @override
    def local_rank(self) -> int:
        return self.process_info.local_rank

    @override
    def node_rank(self) -> int:
        return self.process_info.node
