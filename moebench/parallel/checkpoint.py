"""Checkpoints that a mesh of any size can load, written atomically and verified by checksums.

A checkpoint is a folder in the format of torch.distributed.checkpoint. Every process writes the tensors that it holds,
by name and offset in the full tensor, and reads the parts that it needs, whichever processes wrote them. The folder
gets its final name after all files are on the disk; the manifest with their SHA-256 is written last.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from moebench.file_access import open_member
from moebench.parallel.manifest import Check, Manifest, accept_all, list_manifests, list_unlisted, parse_step
from moebench.parallel.mesh import SINGLE_PROCESS_MESH, Mesh
from moebench.parallel.safe_reader import SafeReader, TensorPlanner, UnsafeCheckpointError, require_tensors

KEEP = 2
"""Checkpoints kept: the older one is the fallback when the newest is damaged."""
FULL_BYTES = 2**20
"""A disk with fewer free bytes counts as full."""
METADATA = ".metadata"
"""File of a checkpoint that says where each tensor is."""
REST = "rest.pt"
"""File of a checkpoint with everything that is not a tensor of the model or the optimizer."""

SINGLE_PROCESS_WARNING = ".*torch.distributed is disabled, unavailable.*"
"""Of torch.distributed.checkpoint, where there is no process group."""
CONTENT_ERRORS = ("PytorchStreamReader", "Missing key in checkpoint", "record size")
"""Parts of torch's messages about the content of a checkpoint, which it raises as plain RuntimeError."""


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's checkpoint I/O: writes the folder step_N.ckpt and then its manifest, step_N.json.

    All processes of the mesh call every method. `storage_options` of a save are further fields of the `Manifest`.
    """

    def __init__(self, mesh: Mesh = SINGLE_PROCESS_MESH) -> None:
        self.mesh = mesh

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        tensors, rest = split_tensors(checkpoint)
        content = io.BytesIO()
        torch.save(rest, content)
        self.write_and_rotate(Path(path), tensors, content.getvalue(), storage_options or {})

    def wait(self) -> None:
        """Block until all checkpoints are on the disk; here they are when a save returns."""

    def write_and_rotate(self, path: Path, tensors: dict[str, Any], rest: bytes, fields: Mapping[str, Any]) -> None:
        """Write a checkpoint and remove those that are too old; `rest`: the content of its file `REST`."""
        self._write(path, tensors, rest, fields)
        if self.mesh.is_first:
            keep_newest_checkpoints(KEEP, path.parent)
        self.mesh.barrier()

    def save_weights(self, weights: Mapping[str, Any], path: Path, fields: Mapping[str, Any]) -> None:
        """Save tensors alone, by name, in the format of a checkpoint; other checkpoints in the folder stay."""
        rest = io.BytesIO()
        torch.save({}, rest)
        self._write(path, {"state_dict": dict(weights)}, rest.getvalue(), fields)
        self.mesh.barrier()

    def _write(self, folder: Path, tensors: dict[str, Any], rest: bytes, fields: Mapping[str, Any]) -> None:
        unfinished = folder.with_name(f".{folder.name}.tmp")  # in the same folder, so that the rename is atomic
        try:
            if self.mesh.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True)
                (unfinished / REST).write_bytes(rest)
            self.mesh.barrier()
            with self._torch_checkpoint_errors():
                no_dist = not self.mesh.process_info.has_group
                save(tensors, checkpoint_id=unfinished, process_group=self.mesh.object_group, no_dist=no_dist)
            written = self.mesh.gather_objects(_sync_files_of_rank(unfinished, self.mesh.rank))
            if self.mesh.is_first:
                _publish(unfinished, folder, written, fields)
        except RuntimeError as error:
            # torch's archive writer reports where it failed, but not that the disk is full.
            if "inline_container" in str(error) and shutil.disk_usage(folder.parent).free < FULL_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
            raise
        finally:
            if self.mesh.is_first:
                shutil.rmtree(unfinished, ignore_errors=True)

    def load_into(self, state: dict[str, Any], path: Path) -> dict[str, Any]:
        """Load a checkpoint's tensors in place into `state`, which has `state_dict` and `optimizer_states`.

        Each process loads the parts that it holds. Returns everything else in the checkpoint.
        """
        tensors, _ = split_tensors(state)
        self._load(tensors, path)
        rest: dict[str, Any] = self.load_checkpoint(path)
        settings = rest.pop("optimizer_settings")
        state.update(state_dict=tensors["state_dict"], optimizer_states=[settings | tensors["optimizer"]])
        return rest

    def load_weights(self, weights: dict[str, torch.Tensor], path: Path) -> None:
        """Load the given tensors in place by name; the checkpoint may contain more than these."""
        self._load({"state_dict": weights}, path)

    def _load(self, tensors: dict[str, Any], path: Path) -> None:
        reader, no_dist = SafeReader(path), not self.mesh.process_info.has_group
        with _refusals(path), self._torch_checkpoint_errors():
            load(tensors, storage_reader=reader, planner=TensorPlanner(), no_dist=no_dist)

    @override
    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        # Everything but tensors of model and optimizer; only plain values are ever unpickled.
        with _refusals(Path(path)), open_member(Path(path), REST) as file:
            rest = torch.load(file, map_location=map_location or "cpu", weights_only=True)
            if not isinstance(rest, dict) or not isinstance(rest.get("optimizer_settings"), dict):
                raise ValueError(f"{REST} has no settings of the optimizer")
            return rest

    @contextlib.contextmanager
    def _torch_checkpoint_errors(self) -> Iterator[None]:
        """Raise the cause of a failure in torch.distributed.checkpoint, and suppress its warning about one process."""
        with self._ignored_warning():
            try:
                yield
            except CheckpointException as error:  # a BaseException that hides its causes, such as a full disk
                raise next(iter(error.failures.values()))[0] from error

    @contextlib.contextmanager
    def _ignored_warning(self) -> Iterator[None]:
        with warnings.catch_warnings():
            if not self.mesh.process_info.has_group:
                warnings.filterwarnings("ignore", message=SINGLE_PROCESS_WARNING)
            yield

    @override
    def remove_checkpoint(self, path: Any) -> None:
        _remove(Path(path))


@contextlib.contextmanager
def _refusals(checkpoint: Path) -> Iterator[None]:
    """Raise UnsafeCheckpointError, one line, where a file of a checkpoint has anything but tensors and plain values."""
    try:
        yield
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(name in str(error) for name in CONTENT_ERRORS):
            raise
        # torch's message recommends to load the file without `weights_only`, which would run its code.
        other = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        reason = f"{other[1]} in place of tensors and plain values" if other else " ".join(str(error).split())[:300]
        raise UnsafeCheckpointError(
            f"{checkpoint}: refused, its content is not what its run saves: {reason}"
        ) from error


def find_refused_content(checkpoint: Path, *, has_weights_alone: bool = False) -> str | None:
    """Return why a checkpoint whose checksums are right is not loaded, or None; one tensor at a time is in memory."""
    try:
        with _refusals(checkpoint):
            require_tensors(checkpoint)
        if not has_weights_alone:
            VerifiedCheckpointIO().load_checkpoint(checkpoint)
    except UnsafeCheckpointError as error:
        return str(error).removeprefix(f"{checkpoint}: ")
    return None


def split_tensors(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a checkpoint into the tensors of model and optimizer, and everything else.

    torch.distributed.checkpoint would store the rest as pickles, and execute them when it loads.
    """
    (optimizer,) = checkpoint["optimizer_states"]
    tensors = {name: value for name, value in optimizer.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in checkpoint.items() if name not in ("state_dict", "optimizer_states")}
    rest["optimizer_settings"] = {name: value for name, value in optimizer.items() if name not in tensors}
    return {"state_dict": checkpoint["state_dict"], "optimizer": tensors}, rest


def remove_checkpoints_after(step: int, folder: Path) -> None:
    """Remove the checkpoints of later steps, and what a killed process left unfinished.

    Later ones are damaged, or the run would resume from them; as the newest they would displace valid ones.
    """
    for manifest in list_manifests(folder):
        if parse_step(manifest) > step:
            _remove(manifest.with_suffix(".ckpt"))
    for unfinished in folder.glob(".step_*.tmp"):
        shutil.rmtree(unfinished, ignore_errors=True) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)


def keep_newest_checkpoints(count: int, folder: Path) -> None:
    """Remove all but the newest `count` checkpoints of a folder."""
    for manifest in list_manifests(folder)[:-count]:
        _remove(manifest.with_suffix(".ckpt"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step."""
    return folder / f"step_{step:07d}.ckpt"


def find_newest_valid(
    folder: Path, mesh: Mesh = SINGLE_PROCESS_MESH, check: Check = accept_all
) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that is complete, has correct checksums and passes `check`.

    The second value has one line for each newer one, which is damaged. All processes of a mesh call it and get the same
    result; each verifies a part of the files.
    """
    damaged: list[str] = []
    for path in mesh.broadcast_object(list_manifests(folder)[::-1]):
        problems = [problem for problem in mesh.gather_objects(find_damage(path, check, mesh)) if problem]
        if not problems:
            return path.with_suffix(".ckpt"), [f"{line}; the one before is used" for line in damaged]
        damaged.append(f"{path.stem}.ckpt: damaged ({problems[0]})")
    return None, [f"{line}; there is no valid one before" for line in damaged]


def find_damage(path: Path, check: Check = accept_all, mesh: Mesh = SINGLE_PROCESS_MESH) -> str | None:
    """Return why a checkpoint, given by its manifest, cannot be used, or None; each process verifies a part of it."""
    checkpoint = path.with_suffix(".ckpt")
    try:
        manifest = Manifest.read(path)
        problem = next(list_unlisted(manifest, checkpoint, (METADATA, REST)), None) or check(manifest)
        names = sorted(manifest.sha256)[mesh.rank :: mesh.size] if not problem else []
        mismatches = [name for name in names if _digest(checkpoint, name) != manifest.sha256[name]]
    except (OSError, ValueError, RecursionError) as error:
        return f"not readable: {error}"
    if mismatches:
        return f"checksum of {', '.join(mismatches)} does not match its manifest"
    return problem


def _sync_files_of_rank(unfinished: Path, rank: int) -> dict[str, tuple[str, int]]:
    """Flush the files that a process wrote to the disk; return the SHA-256 and the size of each."""
    written = {}
    for file in unfinished.iterdir():
        writer = re.match(r"__(\d+)_", file.name)  # files without a rank were written by rank 0
        if int(writer[1]) == rank if writer else rank == 0:
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
            written[file.name] = _digest(unfinished, file.name), file.stat().st_size
    return written


def _publish(
    unfinished: Path, folder: Path, written: Sequence[Mapping[str, tuple[str, int]]], fields: Mapping[str, Any]
) -> None:
    """Give a checkpoint its final name and write its manifest, from the files that each process wrote."""
    files = {name: file for files_of_rank in written for name, file in sorted(files_of_rank.items())}
    sums = {name: digest for name, (digest, _) in files.items()}
    num_bytes = sum(size for _, size in files.values())
    manifest = Manifest(step=parse_step(folder), sha256=sums, bytes=num_bytes, **fields)
    _remove(folder)  # of an earlier attempt at this step
    os.replace(unfinished, folder)
    _write_atomically(folder.with_suffix(".json"), manifest.to_json())


def _remove(checkpoint: Path) -> None:
    # The manifest first: a checkpoint without one does not count. Something else may have the name of either.
    for path in (checkpoint.with_suffix(".json"), checkpoint):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _digest(folder: Path, name: str) -> str:
    with open_member(folder, name) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as handle:  # a new file, not one that a link with this name chooses
            handle.write(text.encode())
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
