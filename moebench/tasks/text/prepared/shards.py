"""Write shards: the tokens of consecutive blocks, sorted by split and domain; each is written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moebench.file_access import open_to_write, read_plain_json
from moebench.tasks.text.coverage import Coverage
from moebench.tasks.text.prepared.blocks import Position
from moebench.tasks.text.prepared.encoder import EncodedBlock
from moebench.tasks.text.prepared.manifest import FileEntry, Segment, Shard, parse_shard, shard_file
from moebench.tasks.text.splits import SPLITS

UNFINISHED = ".unfinished"
"""Ending of files that are being written."""


@dataclass(frozen=True, kw_only=True)
class FinishedShard:
    """A shard that is on disk, and where the source continues after it."""

    shard: Shard
    end: Position
    coverage: Mapping[str, Coverage]
    """Domain -> what decoding its tokens restores."""

    def write(self, folder: Path, number: int) -> None:
        """Write it beside the files of the shard, which count from then on."""
        coverage = {domain: asdict(each) for domain, each in sorted(self.coverage.items())}
        values = {"shard": asdict(self.shard), "end": asdict(self.end), "coverage": coverage}
        write_file(folder, record_file(number), [json.dumps(values).encode()])

    @classmethod
    def read(cls, folder: Path, number: int) -> "FinishedShard | None":
        """Return a shard; None if it is not finished."""
        try:
            values = read_plain_json(folder / record_file(number))
            shard = parse_shard(values["shard"])
            kinds = {"tokens": shard.tokens, "documents": shard.documents, "bytes": shard.bytes}
            if any(e and (folder / shard_file(kind, number)).stat().st_size != e.size for kind, e in kinds.items()):
                return None
            coverage = {domain: Coverage(**each) for domain, each in values["coverage"].items()}
            return cls(shard=shard, end=Position(**values["end"]), coverage=coverage)
        except (OSError, ValueError, KeyError, TypeError):
            return None


@dataclass
class _Part:
    """What a shard has of one split and domain."""

    tokens: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    document_starts: list[int] = field(default_factory=list)
    num_tokens: int = 0
    num_bytes: int = 0


class ShardBuilder:
    """Collects the blocks of one shard."""

    def __init__(self, separator: int, token_type: type[np.unsignedinteger[Any]]) -> None:
        self.separator_1 = np.array([separator], dtype=token_type)
        self.num_token_bytes = 0
        self.end = Position()
        self.coverage: dict[str, Coverage] = {}
        self._parts: dict[tuple[int, str], _Part] = {}

    def add(self, encoded: EncodedBlock) -> None:
        """Add a block; a separator precedes each document."""
        block = encoded.block
        part = self._parts.setdefault((SPLITS.index(block.split), block.domain), _Part())
        if block.is_start:
            part.document_starts.append(part.num_tokens)
            self._append(part, self.separator_1, None if encoded.count_N is None else np.zeros(1, dtype=np.uint8))
        self._append(part, encoded.token_N, encoded.count_N)
        part.num_bytes += encoded.coverage.num_bytes if encoded.count_N is None else int(encoded.count_N.sum())
        self.coverage.setdefault(block.domain, Coverage()).merge(encoded.coverage)
        self.end = block.end

    def _append(self, part: _Part, token_N: np.ndarray, count_N: np.ndarray | None) -> None:
        part.tokens.append(token_N)
        part.num_tokens += len(token_N)
        self.num_token_bytes += token_N.nbytes
        if count_N is not None:
            part.counts.append(count_N)

    def write(self, folder: Path, number: int) -> FinishedShard:
        """Write the files of the shard."""
        keys = sorted(self._parts)
        parts = [self._parts[key] for key in keys]
        counts = [count_N for part in parts for count_N in part.counts]
        byte_type = np.result_type(np.uint8, *{count_N.dtype for count_N in counts}) if counts else None
        before_P = np.cumsum([0, *(part.num_tokens for part in parts)])
        starts = [
            np.array(part.document_starts, dtype=np.int64) + before
            for part, before in zip(parts, before_P[:-1], strict=True)
        ]
        tokens = (token_N for part in parts for token_N in part.tokens)
        shard = Shard(
            tokens=write_file(folder, shard_file("tokens", number), map(np.ndarray.tobytes, tokens)),
            documents=write_file(folder, shard_file("documents", number), map(np.ndarray.tobytes, starts)),
            bytes=None
            if byte_type is None
            else write_file(folder, shard_file("bytes", number), (each.astype(byte_type).tobytes() for each in counts)),
            byte_type=None if byte_type is None else byte_type.name,
            segments=tuple(
                Segment(
                    split=SPLITS[split],
                    domain=domain,
                    num_tokens=part.num_tokens,
                    num_documents=len(part.document_starts),
                    num_bytes=part.num_bytes,
                )
                for (split, domain), part in zip(keys, parts, strict=True)
            ),
        )
        finished = FinishedShard(shard=shard, end=self.end, coverage=self.coverage)
        finished.write(folder, number)
        return finished


def write_file(folder: Path, name: str, contents: Iterable[bytes]) -> FileEntry:
    """Write a file completely, then give it its name; return its size and checksum."""
    unfinished, digest, size = folder / f"{name}{UNFINISHED}", hashlib.sha256(), 0
    with os.fdopen(open_to_write(unfinished, os.O_TRUNC), "wb") as file:
        for content in contents:
            file.write(content)
            digest.update(content)
            size += len(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, folder / name)
    return FileEntry(size=size, sha256=digest.hexdigest())


def record_file(number: int) -> str:
    """Return the name of the record of a finished shard."""
    return f"shard-{number:05d}.json"
