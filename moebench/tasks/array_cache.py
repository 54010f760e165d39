"""Prepared data on disk: arrays made once by whichever process comes first, then read in place by every run."""

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

Prepared = tuple[dict[str, Any], dict[str, np.ndarray]]
"""What is known about the data (JSON values, among them its digest), and its arrays by name."""


def cached(folder: Path, make: Callable[[], Prepared]) -> Prepared:
    """Return what lies in `folder`, or else what `make` returns, kept there; safe in parallel processes.

    The arrays are memory maps. `digest` joins what is known: a SHA-256 (hex) of the arrays and all else.
    """
    found = _read(folder)
    if found is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = _read(folder)  # another process may have made it while this one waited
            if found is None:
                _write(folder, *make())
                found = _read(folder)
    if found is None:
        raise UsageError(f"cache: '{folder}' cannot be read back after writing; check the disk")
    return found


def _read(folder: Path) -> Prepared | None:
    """Return what is cached, or None when it is absent, of another form or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in meta["checksums"]}
        if any(_checksum(array) != meta["checksums"][name] for name, array in arrays.items()):
            return None
        if meta["checksum"] != _meta_checksum(meta):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta, arrays


def _write(folder: Path, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write everything beside the folder, then put it in its place at once."""
    meta = meta | {"digest": _digest(meta, arrays)}
    meta["checksums"] = {name: _checksum(array) for name, array in arrays.items()}
    meta["checksum"] = _meta_checksum(meta)
    made = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        for name, array in arrays.items():
            np.save(made / f"{name}.npy", array)
        (made / "meta.json").write_text(json.dumps(meta))
        made.chmod(0o755)  # mkdtemp makes it private, but a cache may be shared
        shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)
        os.replace(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _digest(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _checksum(array: np.ndarray) -> str:
    return f"{array.dtype.str}{array.shape}{zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())
