"""Cache of prepared data on disk: memory-mapped arrays and their metadata, created once."""

import hashlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from moebench.errors import UsageError
from moebench.file_access import is_plain_name

Arrays = dict[str, np.ndarray]


def load_or_create(folder: Path, create: Callable[[], tuple[dict[str, Any], Arrays]]) -> tuple[dict[str, Any], Arrays]:
    """Return the metadata and arrays in the folder, creating them first if needed; safe in parallel processes.

    `create` returns metadata (JSON) and arrays; a "digest" is added to the metadata, a SHA-256 (hex) of both.
    """
    entry = _read(folder)
    if entry is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folder.parent.is_symlink() or folder.is_symlink():
            raise UsageError(f"cache: '{folder}' is or lies in a symbolic link, which is not followed; remove the link")
        with FileLock(f"{folder}.lock"):
            entry = _read(folder)  # another process may have created it in the meantime
            if entry is None:
                for leftover in folder.parent.glob(f"{folder.name}.*/"):  # of a process that was killed while writing
                    shutil.rmtree(leftover, ignore_errors=True)
                _write(folder, *create())
                entry = _read(folder)
    if entry is None:
        raise UsageError(f"cache: '{folder}' cannot be read back after writing; check the disk")
    return entry


def digest_of(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 (hex) of metadata and arrays."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], Arrays] | None:
    """Return the content of the folder; None if it is absent, damaged or of another format."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # As plain arrays, because slicing np.memmap is slow and batches are made of slices.
        if not all(is_plain_name(name) for name in meta["checksums"]):
            return None
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in meta["checksums"]}
        if any(_checksum(array) != meta["checksums"][name] for name, array in arrays.items()):
            return None
        if meta["checksum"] != _meta_checksum(meta):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return meta, arrays


def _write(folder: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    """Write into a temporary folder, then replace the folder atomically."""
    meta = meta | {"digest": digest_of(meta, arrays)}
    meta["checksums"] = {name: _checksum(array) for name, array in arrays.items()}
    meta["checksum"] = _meta_checksum(meta)
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


def _checksum(array: np.ndarray) -> str:
    return f"{array.dtype.str}{array.shape}{zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())
