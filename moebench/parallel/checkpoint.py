"""Checkpoints that any number of processes can load, and that cannot be half-written or silently damaged.

A checkpoint is a folder of torch.distributed.checkpoint: every process writes the tensors that it holds, under their
names and with their place in the whole tensor, and reads what it needs of them whoever wrote it. The folder gets its
name when all is on the disk; the manifest beside it, with the SHA-256 of each of its files, comes last.
"""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.parallel.metadata import PlainReader

KEEP = 2
"""Checkpoints kept; the older one is the way back when the newest is damaged."""
FULL_BYTES = 2**20
"""A disk with less than this free counts as full."""
REST = "rest.pt"
"""Of a checkpoint's files the one with all that is no tensor of the model or the optimizer."""


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to disk: writes the folder step_N.ckpt and, last, its manifest step_N.json."""

    def __init__(self, mesh: Mesh = SINGLE_PROCESS_MESH) -> None:
        self.mesh = mesh

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint and its manifest, then drop all but the newest ones; all processes call it."""
        folder = Path(path)
        half = folder.with_name(f".{folder.name}.tmp")  # in the same folder: the rename is atomic
        tensors, rest = _parted(checkpoint)
        try:
            if self.mesh.is_first:
                shutil.rmtree(half, ignore_errors=True)
                half.mkdir(parents=True)
                torch.save(rest, half / REST)
            self.mesh.barrier()
            with self._alone_or_together():
                save(tensors, checkpoint_id=half, no_dist=not self.mesh.process_info.has_group)
            written = self.mesh.gather_objects(_sync_own_files(half, self.mesh.rank))
            if self.mesh.is_first:
                _publish(half, folder, written)
                keep_newest_checkpoints(KEEP, folder.parent)
        except RuntimeError as error:
            # torch's writer of archives says where it stopped, not why.
            if "inline_container" in str(error) and shutil.disk_usage(folder.parent).free < FULL_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
        finally:
            if self.mesh.is_first:
                shutil.rmtree(half, ignore_errors=True)
        self.mesh.barrier()

    def load_into(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Fill `state` (its state_dict and optimizer_states) from a checkpoint, each process what it holds of it.

        Returns what else is in the checkpoint.
        """
        tensors, _ = _parted(state)
        with self._alone_or_together():
            load(tensors, storage_reader=PlainReader(path), no_dist=not self.mesh.process_info.has_group)
        rest: dict[str, Any] = self.load_checkpoint(path)
        settings = rest.pop("optimizer_settings")
        state.update(state_dict=tensors["state_dict"], optimizer_states=[settings | tensors["optimizer"]])
        return rest

    def load_weights(self, weights: dict[str, torch.Tensor], path: Path) -> None:
        """Fill the tensors of a model alone, by their names in the checkpoint; more than these may be in it."""
        with self._alone_or_together():
            load(
                {"state_dict": weights}, storage_reader=PlainReader(path), no_dist=not self.mesh.process_info.has_group
            )

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read what is no tensor of model or optimizer; only plain values are ever unpickled."""
        return torch.load(Path(path) / REST, map_location=map_location or "cpu", weights_only=True)

    @contextlib.contextmanager
    def _alone_or_together(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if not self.mesh.process_info.has_group:  # one process is what is meant
                warnings.filterwarnings("ignore", message=".*torch.distributed is disabled, unavailable.*")
            try:
                yield
            except CheckpointException as error:  # no Exception, and hides what happened: a full disk, say
                raise next(iter(error.failures.values()))[0] from error

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint and its manifest."""
        _remove(Path(path))


def _parted(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the tensors of a checkpoint, and the rest: numbers that are no tensors are not worth a file of their own.

    (torch.distributed.checkpoint would store them as pickles, and run what it finds in them.)
    """
    (optimizer,) = checkpoint["optimizer_states"]
    tensors = {name: value for name, value in optimizer.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    rest["optimizer_settings"] = {name: value for name, value in optimizer.items() if name not in tensors}
    return {"state_dict": checkpoint["state_dict"], "optimizer": tensors}, rest


def remove_checkpoints_after(step: int, folder: Path) -> None:
    """Remove the checkpoints beyond a step and what a killed process left half-written.

    They are damaged (or the run would go on from them), and being newer they would push out good ones.
    """
    for manifest in _manifests(folder):
        if parse_step(manifest) > step:
            _remove(manifest.with_suffix(".ckpt"))
    for half in folder.glob(".step_*.tmp"):
        shutil.rmtree(half, ignore_errors=True) if half.is_dir() else half.unlink(missing_ok=True)


def keep_newest_checkpoints(count: int, folder: Path) -> None:
    """Remove all but the newest checkpoints of a folder."""
    for manifest in _manifests(folder)[:-count]:
        _remove(manifest.with_suffix(".ckpt"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step_{step:07d}.ckpt"


def parse_step(file: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(file.stem.removeprefix("step_"))


def find_newest_valid(folder: Path, mesh: Mesh = SINGLE_PROCESS_MESH) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose checksums are right, and one line for each damaged one passed over.

    All processes of a mesh call it and get the same: each reads its share of the files.
    """
    damaged: list[str] = []
    for manifest in mesh.broadcast_object(_manifests(folder)[::-1]):
        checkpoint = manifest.with_suffix(".ckpt")
        checked = mesh.gather_objects(_check_share(manifest, mesh.rank, mesh.size))
        problems = [problem for problem, _ in checked if problem]
        wrong = sorted(name for _, names in checked for name in names)
        if wrong and not problems:
            problems = [f"checksum of {', '.join(wrong)} does not match its manifest"]
        if not problems:
            return checkpoint, damaged
        damaged.append(f"{checkpoint.name}: {problems[0]}; the one before is used")
    return None, damaged


def _check_share(manifest: Path, rank: int, size: int) -> tuple[str | None, list[str]]:
    """Return why a checkpoint cannot be read, and which of every `size`-th file, from `rank` on, are damaged."""
    try:
        expected = json.loads(manifest.read_text())["sha256"]
        names = sorted(expected)[rank::size]
        wrong = [name for name in names if _digest(manifest.with_suffix(".ckpt") / name) != expected[name]]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return f"not readable ({error})", []
    return None if expected else "the list of checksums does not match its manifest", wrong


def _sync_own_files(half: Path, rank: int) -> dict[str, tuple[str, int]]:
    """Bring the files that a process wrote to the disk; return the SHA-256 and the size of each."""
    written = {}
    for file in half.iterdir():
        writer = re.match(r"__(\d+)_", file.name)  # the first process wrote all that have no number
        if int(writer[1]) == rank if writer else rank == 0:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            written[file.name] = _digest(file), file.stat().st_size
    return written


def _publish(half: Path, folder: Path, written: Sequence[Mapping[str, tuple[str, int]]]) -> None:
    """Give a folder its name, and write its manifest, from what each process wrote."""
    files = {name: found for own in written for name, found in sorted(own.items())}
    sums = {name: digest for name, (digest, _) in files.items()}
    manifest = {"step": parse_step(folder), "sha256": sums, "bytes": sum(size for _, size in files.values())}
    _remove(folder)  # of an earlier attempt at this step
    os.replace(half, folder)
    _replace(folder.with_suffix(".json"), lambda handle: handle.write(json.dumps(manifest).encode()))


def _remove(checkpoint: Path) -> None:
    checkpoint.with_suffix(".json").unlink(missing_ok=True)  # first: without its manifest a checkpoint does not count
    shutil.rmtree(checkpoint, ignore_errors=True)


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.json"), key=parse_step)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _replace(file: Path, write: Callable[[Any], Any]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
