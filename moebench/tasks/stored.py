"""Prepared data on disk: arrays that runs read in place, and what is known about them; made once."""

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

Arrays = dict[str, np.ndarray]


def stored(folder: Path, make: Callable[[], tuple[dict[str, Any], Arrays]]) -> tuple[dict[str, Any], Arrays]:
    """Return what lies in the folder, or else make it and put it there; safe in parallel processes.

    `make` returns what is known (JSON) and the arrays; "digest" is added, a SHA-256 (hex) of both.
    """
    found = _read(folder)
    if found is None:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            found = _read(folder)  # another process may have made it while this one waited
            if found is None:
                for left in folder.parent.glob(f"{folder.name}.*/"):  # by a process that was killed as it wrote
                    shutil.rmtree(left, ignore_errors=True)
                _write(folder, *make())
                found = _read(folder)
    if found is None:
        raise UsageError(f"cache: '{folder}' cannot be read back after writing; check the disk")
    return found


def digest_of(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Return a SHA-256 (hex) of both."""
    digest = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].dtype.str}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read(folder: Path) -> tuple[dict[str, Any], Arrays] | None:
    """Return what lies in the folder, or None when it is absent, of another form or damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        # As plain arrays: np.memmap does work of its own in Python for each slice, and batches are made of slices.
        arrays = {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in meta["checksums"]}
        if any(_checksum(array) != meta["checksums"][name] for name, array in arrays.items()):
            return None
        if meta["checksum"] != _meta_checksum(meta):
            return None
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return meta, arrays


def _write(folder: Path, meta: dict[str, Any], arrays: Arrays) -> None:
    """Write everything beside the folder, then put it in its place at once."""
    meta = meta | {"digest": digest_of(meta, arrays)}
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


def _checksum(array: np.ndarray) -> str:
    return f"{array.dtype.str}{array.shape}{zlib.crc32(np.ascontiguousarray(array).data):08x}"


def _meta_checksum(meta: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps({k: v for k, v in meta.items() if k != "checksum"}, sort_keys=True).encode())
