"""Checkpoints that cannot be half-written or silently damaged: temporary file, fsync, rename, checksum."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

KEEP = 2
"""Checkpoints kept; the older one is the way back when the newest is damaged."""


class VerifiedCheckpointIO(CheckpointIO):
    """Lightning's way to disk: writes step_N.ckpt and, last, its manifest step_N.json with the SHA-256."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write the checkpoint and its manifest, then drop all but the newest ones."""
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        _replace(file, lambda handle: torch.save(checkpoint, handle))
        manifest = {"step": step_of(file), "sha256": _digest(file), "bytes": file.stat().st_size}
        _replace(file.with_suffix(".json"), lambda handle: handle.write(json.dumps(manifest).encode()))
        drop_all_but(KEEP, file.parent)

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> Any:
        """Read a checkpoint; only tensors and plain values are ever unpickled."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint and its manifest."""
        _remove(Path(path))


def clear_after(step: int, folder: Path) -> None:
    """Remove the checkpoints beyond a step and what a killed process left half-written.

    They are damaged (or the run would go on from them), and being newer they would push out good ones.
    """
    for manifest in _manifests(folder):
        if step_of(manifest) > step:
            _remove(manifest.with_suffix(".ckpt"))
    for half in folder.glob(".step_*.tmp"):
        half.unlink(missing_ok=True)


def drop_all_but(count: int, folder: Path) -> None:
    """Remove all but the newest checkpoints of a folder."""
    for manifest in _manifests(folder)[:-count]:
        _remove(manifest.with_suffix(".ckpt"))


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"step_{step:07d}.ckpt"


def step_of(file: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(file.stem.removeprefix("step_"))


def newest_good(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint whose checksum is right, and one line for each damaged one passed over."""
    damaged: list[str] = []
    for manifest in reversed(_manifests(folder)):
        file = manifest.with_suffix(".ckpt")
        try:
            expected = json.loads(manifest.read_text())["sha256"]
            if _digest(file) == expected:
                return file, damaged
            damaged.append(f"{file.name}: checksum does not match its manifest; the one before is used")
        except (OSError, ValueError, KeyError) as error:
            damaged.append(f"{file.name}: not readable ({error}); the one before is used")
    return None, damaged


def _remove(file: Path) -> None:
    file.with_suffix(".json").unlink(missing_ok=True)  # first: without its manifest a checkpoint does not count
    file.unlink(missing_ok=True)


def _manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*.json"), key=step_of)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _replace(file: Path, write: Any) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")  # same folder: the rename is atomic
    try:
        with temporary.open("wb") as handle:
            write(handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
