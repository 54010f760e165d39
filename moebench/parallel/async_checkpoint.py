"""Checkpoints that are written while training continues (`parallel.async_checkpoints`).

A save copies the state and returns; a thread writes the copy as a save that waits does, so that a kill at any moment
leaves the checkpoint before it valid. With several processes the threads have a communicator of their own, because
collectives of two threads in one would meet in another order on each process.
"""

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from moebench.experts.bank import is_sharded
from moebench.parallel.checkpoint import SINGLE_PROCESS_WARNING, VerifiedCheckpointIO, split_tensors
from moebench.parallel.collectives import GroupRanks
from moebench.parallel.mesh import Mesh

HOST = torch.device("cpu")


class AsyncCheckpointIO(VerifiedCheckpointIO):
    """Writes each checkpoint in a thread, one at a time: a save waits for the one before.

    An error of a write is raised by the next save, or by `wait`. All processes of the mesh call every method.
    """

    def __init__(self, mesh: Mesh) -> None:
        super().__init__(mesh)
        # Here, because filters are the same for all threads, and a thread that changed them would change them for all.
        warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
        self._writer = _Writer(_open_own_communicator(mesh))
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.wait()
        tensors, rest = split_tensors(checkpoint)
        content = io.BytesIO()
        torch.save(rest, content)  # lists in it grow in training
        arguments = Path(path), tree_map_only(Tensor, _copy, tensors), content.getvalue(), storage_options or {}
        # A daemon: a process whose training has failed must not wait for others that have failed too.
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Block until the last save is on the disk; raise its error."""
        if self._thread is not None:
            self._thread.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    def _run(self, *arguments: Any) -> None:
        try:
            self._writer.write_and_rotate(*arguments)
        except BaseException as error:
            self._error = error  # raised in the thread of the training


class _Writer(VerifiedCheckpointIO):
    """What the thread calls."""

    @contextlib.contextmanager
    @override
    def _ignored_warning(self) -> Iterator[None]:
        yield


def _copy(value: Tensor) -> Tensor:
    """Return a copy on the host; of a shard of the experts, on its device."""
    value = value.detach()
    return value.clone() if is_sharded(value) else value.to(HOST, copy=True)


def _open_own_communicator(mesh: Mesh) -> Mesh:
    """Return the mesh with a process group for objects and barriers that nothing else uses, over the host."""
    if not mesh.process_info.has_group:
        return mesh
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=mesh.config.timeout_s))
    return replace(mesh, world=GroupRanks(group, HOST), device=HOST, object_group=group)
