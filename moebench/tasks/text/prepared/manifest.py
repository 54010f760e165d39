"""The manifest of a prepared folder: which files it has, what is in them, and a digest of all."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.file_access import open_member
from moebench.stored_values import require_count, require_name
from moebench.tasks.text.splits import SPLITS
from moebench.tasks.text.tokens import MAX_VOCAB

MANIFEST = "manifest.json"
STATE = "prepare.json"
"""File of the options and the source, by which a run that was interrupted continues."""
NOT_FINISHED = "is not finished; the `moebench prepare` that began it continues where it stopped"
"""What is said of a folder that has `STATE` and no `MANIFEST`."""
TOKENIZER = "tokenizer.json"
OVERLAP = "overlap.json"
"""File of the evaluation documents that are left out, until the folder is finished."""
COUNTS = "token_counts.bin"
"""How often each id (columns) occurs in the training split of each domain (rows): int64."""
BYTES = "token_bytes.bin"
"""Bytes of each id: uint32."""
FORMAT = "moebench prepared text 1"
LONGEST_MANIFEST = 1 << 26
MAX_COUNTS = 1 << 25
"""Largest number of domains times ids: the table of token counts has an entry for each."""
MAX_DOMAINS = 1024
COUNT_TYPES = ("uint8", "uint16", "uint32")
"""Types of the files of byte counts."""


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Size and checksum of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Segment:
    """The consecutive tokens of one split and domain in a shard, each document after a separator."""

    split: str
    domain: str
    num_tokens: int
    num_documents: int
    """Documents that begin in it."""
    num_bytes: int
    """UTF-8 bytes of its text."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """The files of a shard: tokens, where documents begin, and the bytes of tokens if the vocabulary has none."""

    tokens: FileEntry
    documents: FileEntry
    bytes: FileEntry | None
    byte_type: str | None
    segments: tuple[Segment, ...]
    """In the order of the file."""

    def starts(self) -> Iterator[tuple[int, Segment]]:
        """Yield each segment with its first token."""
        start = 0
        for segment in self.segments:
            yield start, segment
            start += segment.num_tokens


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds."""

    vocab_size: int
    separator: int
    tokenizer: FileEntry | None
    """None: bytes."""
    bytes: FileEntry | None
    """Bytes of each id; None where the shards have those of each token."""
    counts: FileEntry
    shards: tuple[Shard, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    source: Mapping[str, Any] = field(default_factory=dict)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, sorted."""
        return tuple(sorted({segment.domain for shard in self.shards for segment in shard.segments}))

    @property
    def token_type(self) -> str:
        """Type of the tokens in the files."""
        return "uint16" if self.vocab_size <= 1 << 16 else "uint32"

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of everything that training reads, independent of the source's name and the options."""
        content = asdict(replace(self, options={}, source={}))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def overlap(self) -> dict[str, tuple[int, int]] | None:
        """Domain -> evaluation documents left out because the training split has them, and all; None: not measured."""
        counts = self.source.get("overlap")
        return {domain: (removed, total) for domain, (removed, total) in counts.items()} if counts else None

    def totals(self) -> dict[str, dict[str, dict[str, int]]]:
        """Return documents, tokens and bytes by domain and split."""
        result: dict[str, dict[str, dict[str, int]]] = {}
        for segment in (segment for shard in self.shards for segment in shard.segments):
            entry = result.setdefault(segment.domain, {}).setdefault(
                segment.split, dict.fromkeys(("documents", "tokens", "bytes"), 0)
            )
            entry["documents"] += segment.num_documents
            entry["tokens"] += segment.num_tokens
            entry["bytes"] += segment.num_bytes
        return result

    def to_json(self) -> str:
        """Return the content of the file."""
        values = {"format": FORMAT, "digest": self.digest, "domains": self.totals(), **asdict(self)}
        values["checksum"] = _checksum(values)
        return json.dumps(values, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder; raise UsageError, which names the folder, if it is missing or not valid."""
    if (folder / STATE).is_file() and not (folder / MANIFEST).exists():
        raise UsageError(f"prepared folder '{folder}' {NOT_FINISHED}")
    if not (folder / MANIFEST).exists():
        raise UsageError(f"'{folder}' is not a prepared folder: it has no {MANIFEST}; `moebench prepare` writes one")
    try:
        with open_member(folder, MANIFEST) as file:
            data = file.read(LONGEST_MANIFEST + 1)
        if len(data) > LONGEST_MANIFEST:
            raise ValueError(f"it is longer than {LONGEST_MANIFEST >> 20} MiB")
        values = json.loads(data)
        if values["format"] != FORMAT:
            raise ValueError(f"it has the format {values['format']!r}, not {FORMAT!r}")
        if values.pop("checksum") != _checksum(values):
            raise ValueError("its checksum is wrong")
        return _parse(values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise UsageError(
            f"prepared folder '{folder}': {MANIFEST} is not valid ({reason}); prepare it again with `moebench prepare`"
        ) from error


def shard_file(kind: str, number: int) -> str:
    """Return the name of a file of a shard."""
    return f"{kind}-{number:05d}.bin"


def list_files(manifest: Manifest) -> Iterator[tuple[str, FileEntry]]:
    """Yield the name and the entry of every file of a folder."""
    if manifest.tokenizer is not None:
        yield TOKENIZER, manifest.tokenizer
    yield COUNTS, manifest.counts
    if manifest.bytes is not None:
        yield BYTES, manifest.bytes
    for number, shard in enumerate(manifest.shards):
        yield shard_file("tokens", number), shard.tokens
        yield shard_file("documents", number), shard.documents
        if shard.bytes is not None:
            yield shard_file("bytes", number), shard.bytes


def parse_shard(values: Mapping[str, Any]) -> Shard:
    """Return a shard from JSON; raise ValueError, KeyError or TypeError for what none can be."""
    segments = tuple(
        Segment(
            split=_one_of(SPLITS, each["split"]),
            domain=require_name(each["domain"]),
            **{name: require_count(each[name]) for name in ("num_tokens", "num_documents", "num_bytes")},
        )
        for each in values["segments"]
    )
    counted = None if values["bytes"] is None else _one_of(COUNT_TYPES, values["byte_type"])
    return Shard(
        tokens=_parse_entry(values["tokens"]),
        documents=_parse_entry(values["documents"]),
        bytes=None if counted is None else _parse_entry(values["bytes"]),
        byte_type=counted,
        segments=segments,
    )


def _parse(values: Mapping[str, Any]) -> Manifest:
    vocab_size = require_count(values["vocab_size"])
    if not 1 <= vocab_size <= MAX_VOCAB or not require_count(values["separator"]) < vocab_size:
        raise ValueError(f"vocab_size {vocab_size} and separator {values['separator']} cannot be")
    manifest = Manifest(
        vocab_size=vocab_size,
        separator=values["separator"],
        tokenizer=None if values["tokenizer"] is None else _parse_entry(values["tokenizer"]),
        bytes=None if values["bytes"] is None else _parse_entry(values["bytes"]),
        counts=_parse_entry(values["counts"]),
        shards=tuple(map(parse_shard, values["shards"])),
        options=dict(values["options"]),
        source=dict(values["source"]),
    )
    _check_sizes(manifest)
    for removed, total in (manifest.overlap or {}).values():
        if require_count(removed) > require_count(total):
            raise ValueError(f"{removed} of {total} documents cannot be left out")
    if manifest.digest != values["digest"]:
        raise ValueError("its digest is wrong")
    return manifest


def _check_sizes(manifest: Manifest) -> None:
    """Raise ValueError if the sizes of files do not match their content."""
    num_domains = len(manifest.domains)
    require_size(num_domains, manifest.vocab_size)
    expected = [(manifest.counts, 8 * num_domains * manifest.vocab_size)]
    if manifest.bytes is not None:
        expected.append((manifest.bytes, 4 * manifest.vocab_size))
    for shard in manifest.shards:
        num_tokens = sum(segment.num_tokens for segment in shard.segments)
        expected.append((shard.tokens, num_tokens * np.dtype(manifest.token_type).itemsize))
        expected.append((shard.documents, 8 * sum(segment.num_documents for segment in shard.segments)))
        if (shard.bytes is None) != (manifest.bytes is not None):
            raise ValueError("byte counts are missing, or there are two")
        if shard.bytes is not None:
            expected.append((shard.bytes, num_tokens * np.dtype(shard.byte_type).itemsize))
    if any(entry.size != size for entry, size in expected):
        raise ValueError("the sizes of files do not match their content")


def require_size(num_domains: int, vocab_size: int) -> None:
    """Raise ValueError for more domains than the table of token counts can have."""
    allowed = min(MAX_DOMAINS, MAX_COUNTS // vocab_size)
    if not 1 <= num_domains <= allowed:
        raise ValueError(f"there are {num_domains} domains; allowed with {vocab_size} ids: 1 to {allowed}")


def _parse_entry(values: Mapping[str, Any]) -> FileEntry:
    return FileEntry(size=require_count(values["size"]), sha256=require_name(values["sha256"]))


def _one_of(allowed: Sequence[str], value: Any) -> str:
    if value not in allowed:
        raise ValueError(f"{value!r} is not one of {', '.join(allowed)}")
    return str(value)


def _checksum(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
