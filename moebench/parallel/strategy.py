"""Lightning strategies for one process and for many: the same checkpoints, so that each can go on from the other's."""

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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from moebench.parallel.checkpoint import VerifiedCheckpointIO
from moebench.parallel.gradients import average_expert_gradients
from moebench.parallel.mesh import Mesh
from moebench.parallel.process_info import ProcessInfo

BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
"""State under the names of parameters: how they are grouped, and where they lie, can then change."""


def build_strategy(mesh: Mesh, checkpoint_io: VerifiedCheckpointIO) -> Strategy:
    """Return what trains a module on a mesh."""
    if not mesh.process_info.has_group:
        return OneProcess(device=mesh.device, checkpoint_io=checkpoint_io)
    return ManyProcesses(mesh, checkpoint_io)


class _StateByName(Strategy):
    """Hands a checkpoint's tensors to the `checkpoint_io` by name and as they are spread, and gets them back so."""

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The optimizer must be there."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """It is restored here."""
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers by name."""
        assert self.lightning_module is not None
        return get_model_state_dict(self.lightning_module, options=BY_NAME)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return the optimizer's state by the names of the parameters."""
        assert self.lightning_module is not None
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        return get_optimizer_state_dict(self.lightning_module, optimizer, options=BY_NAME)

    def save_checkpoint(self, checkpoint: Any, filepath: Any, storage_options: Any | None = None) -> None:
        """Save on all processes together."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors into module and optimizer, and return the rest."""
        assert self.lightning_module is not None
        (optimizer,) = self.optimizers
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        state: dict[str, Any] = {
            "state_dict": self.lightning_module_state_dict(),
            "optimizer_states": [self.optimizer_state(optimizer)],
        }
        files = self.checkpoint_io
        assert isinstance(files, VerifiedCheckpointIO)
        rest = files.load_into(state, Path(checkpoint_path))
        set_model_state_dict(self.lightning_module, state["state_dict"], options=BY_NAME)
        set_optimizer_state_dict(
            self.lightning_module, optimizer, optim_state_dict=state["optimizer_states"][0], options=BY_NAME
        )
        return rest

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing: `load_checkpoint` has done it."""


class OneProcess(_StateByName, SingleDeviceStrategy):
    """One process on one device."""


class ManyProcesses(_StateByName, DDPStrategy):
    """DDP for what every process has a copy of; spread experts are averaged here."""

    def __init__(self, mesh: Mesh, checkpoint_io: VerifiedCheckpointIO) -> None:
        process_info = mesh.process_info
        on_gpu = mesh.device.type == "cuda"
        super().__init__(
            parallel_devices=[
                torch.device("cuda", n) if on_gpu else mesh.device for n in range(process_info.local_world_size)
            ],
            cluster_environment=GivenProcesses(process_info),
            checkpoint_io=checkpoint_io,
            timeout=timedelta(seconds=mesh.config.timeout_s),
            # Buffers are router state: the same everywhere by construction, checked, and never overwritten.
            broadcast_buffers=False,
            # Else DDP packs its buckets anew behind the first step: gradients would be summed in another order in a
            # resumed run than in one that was never stopped, and differ in the last bit.
            find_unused_parameters=True,
        )
        self.mesh = mesh

    def setup(self, trainer: Any) -> None:
        """Keep spread experts from DDP, which would make all of them those of the first process."""
        module = self.lightning_module
        assert module is not None
        spread = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(module, spread)
        super().setup(trainer)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average the experts' gradients behind the last micro-batch, as DDP has the others'."""
        super().post_backward(closure_loss)
        if getattr(self.model, "require_backward_grad_sync", True):
            assert self.lightning_module is not None
            average_expert_gradients(self.lightning_module.parameters(), self.mesh)


class GivenProcesses(ClusterEnvironment):
    """The processes are there and have met: lightning only asks who is who."""

    def __init__(self, process_info: ProcessInfo) -> None:
        self.process_info = process_info

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Where the processes met."""
        return self.process_info.store_host

    @property
    def main_port(self) -> int:
        """The port there."""
        return self.process_info.store_port

    @staticmethod
    def detect() -> bool:
        """Never found by looking: it is passed."""
        return False

    def world_size(self) -> int:
        """Processes of the run."""
        return self.process_info.world_size

    def set_world_size(self, size: int) -> None:
        """Nothing to set."""

    def global_rank(self) -> int:
        """Of this process."""
        return self.process_info.rank

    def set_global_rank(self, rank: int) -> None:
        """Nothing to set."""

    def local_rank(self) -> int:
        """On its node."""
        return self.process_info.local_rank

    def node_rank(self) -> int:
        """Of its node."""
        return self.process_info.node
