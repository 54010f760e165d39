"""Read prepared folders: shards are memory-mapped, and checked by size and time, not by content."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np

from moebench.errors import UsageError
from moebench.file_access import open_member
from moebench.tasks.cache import load_or_create
from moebench.tasks.sources import check_held_out
from moebench.tasks.text.kinds import TokenKinds
from moebench.tasks.text.prepared.manifest import (
    BYTES,
    COUNTS,
    MANIFEST,
    NOT_FINISHED,
    STATE,
    TOKENIZER,
    FileEntry,
    Manifest,
    list_files,
    read_manifest,
    shard_file,
)
from moebench.tasks.text.shuffling import order_by_cipher
from moebench.tasks.text.sources import TextDataConfig
from moebench.tasks.text.splits import SPLITS
from moebench.tasks.text.token_stream import TokenStream
from moebench.tasks.text.tokens import load_tokenizer
from moebench.tasks.text.windows import KINDS_FORMAT, PreparedText, TextSplit

KEPT_OPTIONS = ("path", "made_by", "held_out_domains", "mask_documents")
"""Options of `task.data` that a prepared folder does not fix."""


def is_prepared(data: TextDataConfig) -> bool:
    """Return whether `task.data.path` is a prepared folder; raise UsageError for one that is not finished."""
    if data.path is None:
        return False
    try:
        folder = Path(data.path).expanduser()
        if not (folder / STATE).is_file():
            return (folder / MANIFEST).is_file() and (folder / shard_file("tokens", 0)).is_file()
    except (OSError, ValueError, RuntimeError):
        return False  # a name that no file can have, which reading it reports
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"task.data.path: '{data.path}' {NOT_FINISHED}")
    return True


def read_digest(data: TextDataConfig) -> str:
    """Return the digest of a prepared folder and the domains held out; no shard is read."""
    manifest = read_manifest(_folder(data))
    _require_fixed_options(data, manifest)
    return _digest(manifest, data)


def open_prepared(data: TextDataConfig, cache_dir: Path, sequence_length: int) -> PreparedText:
    """Return the splits of a prepared folder.

    Raises UsageError for a folder that is damaged or was changed, for held-out domains that it lacks, and for a split
    that is shorter than one window.
    """
    folder = _folder(data)
    manifest = read_manifest(folder)
    _require_fixed_options(data, manifest)
    _require_unchanged(folder, manifest)
    held_out = check_held_out(data.held_out_domains, manifest.domains)
    trained = [domain for domain in manifest.domains if domain not in held_out]
    domains = [*trained, *held_out]
    byte_count_V = None if manifest.bytes is None else _map(folder, BYTES, "<u4")
    streams = _Streams(folder, manifest, byte_count_V)
    splits = {name: streams.open(name, domains if name == "test" else trained, sequence_length) for name in SPLITS}
    counts_DV = _map(folder, COUNTS, "<i8").reshape(len(manifest.domains), manifest.vocab_size)
    rows = [manifest.domains.index(domain) for domain in trained]
    tokenizer = "bytes" if manifest.tokenizer is None else str(folder / TOKENIZER)
    return PreparedText(
        **splits,
        vocab_size=manifest.vocab_size,
        domains=tuple(domains),
        num_held_out=len(held_out),
        digest=_digest(manifest, data),
        token_count_V=counts_DV[rows].sum(0),
        kinds=_load_kinds(tokenizer, manifest.tokenizer, cache_dir),
        tokenizer_name=tokenizer,
        overlap=manifest.overlap,
    )


class _Streams:
    """The memory-mapped shards of a folder."""

    def __init__(self, folder: Path, manifest: Manifest, byte_count_V: np.ndarray | None) -> None:
        self.byte_count_V = byte_count_V
        self.tokens: dict[tuple[str, str], list[np.ndarray]] = {}
        self.bytes: dict[tuple[str, str], list[np.ndarray]] = {}
        token_type = np.dtype(manifest.token_type).newbyteorder("<").str
        for number, shard in enumerate(manifest.shards):
            tokens_N = _map(folder, shard_file("tokens", number), token_type)
            byte_type = None if shard.byte_type is None else np.dtype(shard.byte_type).newbyteorder("<").str
            bytes_N = None if byte_type is None else _map(folder, shard_file("bytes", number), byte_type)
            for start, segment in shard.starts():
                key, span = (segment.split, segment.domain), slice(start, start + segment.num_tokens)
                self.tokens.setdefault(key, []).append(tokens_N[span])
                if bytes_N is not None:
                    self.bytes.setdefault(key, []).append(bytes_N[span])

    def open(self, name: str, domains: Sequence[str], sequence_length: int) -> TextSplit:
        """Return a split with these domains."""
        parts_D = [self.tokens.get((name, domain), []) for domain in domains]
        bytes_P = [part for domain in domains for part in self.bytes.get((name, domain), [])]
        split = TextSplit(
            tokens=TokenStream([part for parts in parts_D for part in parts]),
            bytes=TokenStream(bytes_P) if self.byte_count_V is None else self.byte_count_V,
            length_D=np.array([sum(map(len, parts)) for parts in parts_D], dtype=np.int64),
            sequence_length=sequence_length,
            order=order_by_cipher,
        )
        if not split.num_windows:
            raise UsageError(
                f"task.sequence_length: {sequence_length} was given, and no domain has {sequence_length + 1} tokens of"
                f" {name} text; allowed: a shorter sequence, or a folder prepared from more text"
            )
        return split


def _folder(data: TextDataConfig) -> Path:
    assert data.path is not None
    return Path(data.path).expanduser()


def _digest(manifest: Manifest, data: TextDataConfig) -> str:
    return hashlib.sha256(json.dumps([manifest.digest, sorted(data.held_out_domains)]).encode()).hexdigest()


def _require_fixed_options(data: TextDataConfig, manifest: Manifest) -> None:
    """Raise UsageError for options that were decided otherwise when the folder was prepared."""
    defaults = TextDataConfig()
    for option in fields(data):
        given, default = getattr(data, option.name), getattr(defaults, option.name)
        if option.name not in KEPT_OPTIONS and given not in (default, manifest.options.get(option.name, default)):
            raise UsageError(
                f"task.data.{option.name}: '{given}' was given, but '{data.path}' is a prepared folder, where it is"
                f" fixed (allowed: the default, {json.dumps(default)})"
            )


def _require_unchanged(folder: Path, manifest: Manifest) -> None:
    """Raise UsageError for a file that is missing, of another size, or newer than the manifest, the last one."""
    written_ns = (folder / MANIFEST).stat().st_mtime_ns
    for name, entry in list_files(manifest):
        try:
            with open_member(folder, name) as file:
                state = os.fstat(file.fileno())
        except (OSError, ValueError) as error:
            raise UsageError(f"prepared folder '{folder}': {name} cannot be read ({error})") from error
        if state.st_size != entry.size:
            raise UsageError(
                f"prepared folder '{folder}': {name} has {state.st_size:,} bytes, not {entry.size:,}; copy it again, or"
                " prepare it again"
            )
        if state.st_mtime_ns > written_ns:
            raise UsageError(
                f"prepared folder '{folder}': {name} is newer than {MANIFEST}: it was changed, or copied without its"
                f" times; `moebench verify {folder}` checks it, and accepts it if it is right"
            )


def _map(folder: Path, name: str, dtype: str) -> np.ndarray:
    """Return the content of a file, memory-mapped, as a plain array: slicing np.memmap is slow."""
    with open_member(folder, name) as file:
        return np.asarray(np.memmap(file, dtype=dtype, mode="r"))


def _load_kinds(tokenizer: str, entry: FileEntry | None, cache_dir: Path) -> TokenKinds:
    name = "bytes" if entry is None else entry.sha256[:24]
    folder = cache_dir / f"kinds-tokenizer-{name}-{KINDS_FORMAT}"
    _, arrays = load_or_create(
        folder, lambda: ({}, TokenKinds.from_pieces(load_tokenizer(tokenizer).pieces()).arrays())
    )
    return TokenKinds.from_arrays(arrays)
