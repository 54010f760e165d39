"""Cache of prepared data on disk: memory-mapped arrays and their metadata, created once."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from moebench.errors import UsageError
from moebench.file_access import is_plain_name, open_member, read_plain_json

Arrays = dict[str, np.ndarray]
_is_writable: ContextVar[bool] = ContextVar("cache is writable", default=True)


@contextmanager
def keep_cache_unchanged() -> Iterator[None]:
    """Create missing entries in memory alone inside the `with` block."""
    token = _is_writable.set(False)
    try:
        yield
    finally:
        _is_writable.reset(token)


def load_or_create(folder: Path, create: Callable[[], tuple[dict[str, Any], Arrays]]) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and arrays in the folder, creating them first if needed; safe in parallel processes.

    `create` returns metadata (JSON) and arrays; a "digest" is added to the metadata, a SHA-256 (hex) of both. Where the
    cache must not be written, the entry is created in memory. Raises UsageError for a full disk.
    """
    entry = read_entry(folder)
    if entry is not None:
        return entry
    if not _is_writable.get():
        return _complete(*create())
    lock = FileLock(f"{folder}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.parent.is_symlink() or folder.is_symlink():
            raise UsageError(f"cache: '{folder}' is or lies in a symbolic link, which is not followed; remove the link")
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UsageError(f"cache: '{folder}' cannot be written ({error.strerror})") from error
        return _complete(*create())
    try:
        entry = read_entry(folder)  # another process may have created it in the meantime
        if entry is None:
            for leftover in folder.parent.glob(f"{folder.name}.*/"):  # of a process that was killed while writing
                shutil.rmtree(leftover, ignore_errors=True)
            _write(folder, *_complete(*create()))
            entry = read_entry(folder)
    finally:
        lock.release()
    if entry is None:
        raise UsageError(f"cache: '{folder}' cannot be read back after writing; check the disk")
    return entry


def compute_digest_of_entry(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 (hex) of metadata and arrays."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_entry(folder: Path) -> tuple[dict[str, Any], Arrays] | None:
    """Return the content of the folder; None if it is absent, damaged or of another format."""
    try:
        meta = read_plain_json(folder / "meta.json")
        # As plain arrays, because slicing np.memmap is slow and batches are made of slices.
        if not all(is_plain_name(name) for name in meta["checksums"]):
            return None
        arrays = {name: _map_array(folder, f"{name}.npy") for name in meta["checksums"]}
        if any(_checksum(array) != meta["checksums"][name] for name, array in arrays.items()):
            return None
        if meta["checksum"] != _meta_checksum(meta):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return meta, arrays


def _map_array(folder: Path, name: str) -> np.ndarray:
    """Return an array of an entry; raise OSError in place of waiting for a pipe."""
    open_member(folder, name).close()
    return np.asarray(np.load(folder / name, mmap_mode="r"))


def _complete(meta: dict[str, Any], arrays: Arrays) -> tuple[dict[str, Any], Arrays]:
    """Add the digest and the checksums to the metadata."""
    meta = meta | {"digest": compute_digest_of_entry(meta, arrays)}
    meta["checksums"] = {name: _checksum(array) for name, array in arrays.items()}
    meta["checksum"] = _meta_checksum(meta)
    return meta, arrays


def _write(folder: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    """Write into a temporary folder, then replace the folder atomically; raise UsageError for a full disk."""
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array)
            (temporary / "meta.json").write_text(json.dumps(meta))
            temporary.chmod(0o755)  # mkdtemp creates it private, but a cache may be shared
            shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:  # NumPy reports a full disk without an error number
        needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(folder.parent).free
        raise UsageError(
            f"cache: '{folder}' cannot be written ({error.strerror or 'the disk is full'}):"
            f" {needed / 2**20:.0f} MiB needed, {free / 2**20:.0f} MiB free; choose another folder with --results"
        ) from error


def _checksum(array: np.ndarray) -> str:
    return f"{array.dtype.str}{array.shape}{zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())
