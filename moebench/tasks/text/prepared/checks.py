"""`moebench verify DIR`: check every byte of a prepared folder."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moebench.errors import UsageError
from moebench.file_access import open_member
from moebench.tasks.text.prepared.manifest import MANIFEST, FileEntry, Manifest, list_files, read_manifest, shard_file

CHUNK = 1 << 22


def check_prepared(folder: Path) -> Iterator[str]:
    """Yield a line for each problem of a prepared folder; raise UsageError if its manifest is not valid.

    If there is none, the folder counts as written now: training refuses files that are newer than the manifest.
    """
    manifest = read_manifest(folder)
    is_right = True
    for problem in _find_problems(folder, manifest):
        is_right = False
        yield problem
    if is_right:
        with contextlib.suppress(OSError):  # a folder of others, or one that is read-only: it is right as well
            os.utime(folder / MANIFEST, follow_symlinks=False)


def _find_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    damaged = set()
    for name, entry in list_files(manifest):
        if problem := _compare(folder, name, entry):
            damaged.add(name)
            yield f"{name} {problem}"
    for number, shard in enumerate(manifest.shards):
        names = [shard_file(kind, number) for kind in ("tokens", "documents")]
        if damaged.isdisjoint(names) and shard.tokens.size:
            token_type = np.dtype(manifest.token_type).newbyteorder("<")
            tokens_N = np.memmap(folder / names[0], dtype=token_type, mode="r")
            chunks = (tokens_N[start : start + CHUNK] for start in range(0, len(tokens_N), CHUNK))
            if any(chunk.max() >= manifest.vocab_size for chunk in chunks):
                yield f"{names[0]} has ids that the vocabulary does not have"
            starts_M = np.fromfile(folder / names[1], dtype="<i8")
            is_inside = (starts_M >= 0).all() and (starts_M < len(tokens_N)).all()
            if not is_inside or (tokens_N[starts_M] != manifest.separator).any():
                yield f"{names[1]} has documents that do not begin with a separator"


def _compare(folder: Path, name: str, entry: FileEntry) -> str:
    """Return how a file differs from its entry; empty if it does not."""
    try:
        with open_member(folder, name) as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry.size:
                return f"has {size:,} bytes, not {entry.size:,}"
            is_equal = hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
            return "" if is_equal else "has another content than when it was written (SHA-256)"
    except (OSError, ValueError, UsageError) as error:
        return f"cannot be read ({error})"
