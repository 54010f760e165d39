"""Prepare a folder: read, divide and encode a source into shards, and describe them in a manifest."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event

import numpy as np

from moebench.errors import UsageError
from moebench.file_access import read_plain_file
from moebench.tasks.sources import check_domain_names, warn
from moebench.tasks.text.coverage import MIN_COVERAGE, Coverage
from moebench.tasks.text.encoding import map_in_order
from moebench.tasks.text.overlap import warn_removed
from moebench.tasks.text.prepared.blocks import Block, Position
from moebench.tasks.text.prepared.encoder import BlockEncoder, batch_blocks
from moebench.tasks.text.prepared.folder_state import begin_folder, describe_state, discard, lock_folder
from moebench.tasks.text.prepared.manifest import (
    BYTES,
    COUNTS,
    MANIFEST,
    OVERLAP,
    TOKENIZER,
    FileEntry,
    Manifest,
    Shard,
    read_manifest,
    require_size,
    shard_file,
)
from moebench.tasks.text.prepared.options import PrepareOptions
from moebench.tasks.text.prepared.overlap import Overlap, provide_overlap
from moebench.tasks.text.prepared.shards import UNFINISHED, FinishedShard, ShardBuilder, record_file, write_file
from moebench.tasks.text.prepared.source import CorpusSource, Progress, open_source
from moebench.tasks.text.prepared.training import draw_sample, train_tokenizer
from moebench.tasks.text.splits import SPLITS
from moebench.tasks.text.tokens import Tokenizer, load_tokenizer, tokenizer_file

CHUNK = 1 << 22
Report = Callable[[str, Progress], None]
"""Called with the stage and how much of the source was read."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a call of `build_folder` did."""

    manifest: Manifest
    was_ready: bool
    """Whether an earlier call had done all of it."""
    num_kept: int
    """Shards that an earlier call had finished."""


def build_folder(options: PrepareOptions, report: Report) -> Outcome:
    """Prepare a folder, or continue an interrupted call with the same options and source.

    Raises UsageError for a source that cannot be read, a tokenizer that loses text, a split without text, and a folder
    that holds something else. What the call made is removed then, unless a shard was finished.
    """
    source = open_source(options)
    state = describe_state(options, source)
    with lock_folder(options.out):
        is_new = begin_folder(options.out, state)
        try:
            if (options.out / MANIFEST).exists():
                return Outcome(manifest=read_manifest(options.out), was_ready=True, num_kept=0)
            return _Build(options, source, report).run()
        except UsageError:
            if is_new and FinishedShard.read(options.out, 0) is None:
                discard(options.out)
            raise


class _Build:
    """One call of `build_folder`."""

    def __init__(self, options: PrepareOptions, source: CorpusSource, report: Report) -> None:
        self.options, self.source, self.report = options, source, report
        self.coverage: dict[str, Coverage] = {}
        self.overlap = Overlap()
        self.shards: list[Shard] = []

    def run(self) -> Outcome:
        """Write what is missing."""
        out = self.options.out
        with _digest_ahead(self.source) as source_digest:
            entry, tokenizer = self._provide_tokenizer()
            if self.options.remove_overlap:
                self.overlap = provide_overlap(out, self._read_again, self.options.workers)
                warn_removed(self.overlap.documents)
            kept = self._read_finished()
            self._write_shards(tokenizer, kept[-1].end if kept else Position())
            self._check()
            self.report("counting tokens", self.source.progress)
            digest = source_digest.result()
        if self.source.fingerprint() != open_source(self.options).fingerprint():
            raise UsageError(
                f"task.data.path: files were changed while they were prepared; remove {out} and start again"
            )
        manifest = self._describe(tokenizer, entry, digest)
        write_file(out, MANIFEST, [manifest.to_json().encode()])
        for number in range(len(self.shards)):
            (out / record_file(number)).unlink(missing_ok=True)
        (out / OVERLAP).unlink(missing_ok=True)
        return Outcome(manifest=manifest, was_ready=False, num_kept=len(kept))

    def _provide_tokenizer(self) -> tuple[FileEntry | None, Tokenizer]:
        """Put the tokenizer into the folder, training it if requested; return its entry and the tokenizer."""
        out, name, vocab_size = self.options.out, self.options.tokenizer, self.options.vocab_to_train
        if name == "bytes":
            return None, load_tokenizer(name)
        if not (out / TOKENIZER).exists():
            if vocab_size is not None:
                sample = draw_sample(self._read_again("reading the sample"), self.options.sample_bytes)
                self.report("training the tokenizer", self.source.progress)
                content = train_tokenizer(sample, vocab_size).encode()
            else:
                content = _read_tokenizer(name)
            write_file(out, TOKENIZER, [content])
        content = read_plain_file(out / TOKENIZER)
        entry = FileEntry(size=len(content), sha256=hashlib.sha256(content).hexdigest())
        return entry, load_tokenizer(str(out / TOKENIZER), special_as_text=True)

    def _read_again(self, stage: str) -> Iterator[Block]:
        """Yield all blocks of the source."""
        self.source.progress = Progress(self.source.progress.num_bytes)
        return self._reported(stage, Position())

    def _reported(self, stage: str, begin: Position) -> Iterator[Block]:
        for block in self.source.blocks(begin):
            self.report(stage, self.source.progress)
            yield block

    def _read_finished(self) -> list[FinishedShard]:
        """Return the shards that an earlier call finished, and remove what it did not finish."""
        kept: list[FinishedShard] = []
        while (finished := FinishedShard.read(self.options.out, len(kept))) is not None:
            kept.append(finished)
            self._add(finished)
        for path in self.options.out.glob(f"*{UNFINISHED}"):
            path.unlink()
        return kept

    def _write_shards(self, tokenizer: Tokenizer, begin: Position) -> None:
        self.source.progress = Progress(self.source.progress.num_bytes)
        encoder = BlockEncoder(tokenizer)
        builder = ShardBuilder(tokenizer.separator, encoder.token_type)
        batches = batch_blocks(self.overlap.filter(self._reported("encoding", begin)))
        for batch in map_in_order(encoder.encode, batches, self.options.workers):
            for encoded in batch:
                builder.add(encoded)
                if builder.num_token_bytes >= self.options.shard_bytes:
                    self._finish(builder)
                    builder = ShardBuilder(tokenizer.separator, encoder.token_type)
        if builder.num_token_bytes:
            self._finish(builder)

    def _finish(self, builder: ShardBuilder) -> None:
        self._add(builder.write(self.options.out, len(self.shards)))
        for domain, coverage in sorted(self.coverage.items()):
            if coverage.share < MIN_COVERAGE:
                self._refuse_coverage(coverage, domain)

    def _add(self, finished: FinishedShard) -> None:
        self.shards.append(finished.shard)
        for domain, coverage in finished.coverage.items():
            self.coverage.setdefault(domain, Coverage()).merge(coverage)

    def _refuse_coverage(self, coverage: Coverage, domain: str) -> None:
        discard(self.options.out)
        coverage.check(self.options.tokenizer, domain)

    def _check(self) -> None:
        """Raise UsageError if a split has no text or there are too many domains; print what the tokenizer loses."""
        by_split = {
            name: {s.domain for shard in self.shards for s in shard.segments if s.split == name} for name in SPLITS
        }
        empty = [name for name, domains in by_split.items() if not domains]
        if empty:
            by_block = "or " if self.options.split_by == "block" else "--split-by block, or "
            discard(self.options.out)
            raise UsageError(
                f"DATA: the {empty[0]} split has no documents; give more documents, larger shares (--validation,"
                f" --test), {by_block}files in folders named train, validation and test"
            )
        domains = sorted(set().union(*by_split.values()))
        for domain in domains:
            self.coverage[domain].check(self.options.tokenizer, domain)
        check_domain_names(domains)
        for name, present in by_split.items():
            if missing := [domain for domain in domains if domain not in present]:
                names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
                warn(
                    f"no {name} text of {len(missing)} of {len(domains)} domains ({names}): they are not in that split"
                )

    def _describe(self, tokenizer: Tokenizer, entry: FileEntry | None, digest: str) -> Manifest:
        byte_count_V = tokenizer.byte_count_V
        counts_DV = self._count_tokens(tokenizer.vocab_size)
        out, source = self.options.out, self.source
        lengths = None if byte_count_V is None else write_file(out, BYTES, [byte_count_V.astype("<u4").tobytes()])
        return Manifest(
            vocab_size=tokenizer.vocab_size,
            separator=tokenizer.separator,
            tokenizer=entry,
            bytes=lengths,
            counts=write_file(out, COUNTS, (row_V.tobytes() for row_V in counts_DV)),
            shards=tuple(self.shards),
            options=self.options.describe(),
            source={
                "digest": digest,
                "files": len(source.files),
                "bytes": sum(file.size for file in source.files),
                "overlap": self.overlap.documents,
            },
        )

    def _count_tokens(self, vocab_size: int) -> np.ndarray:
        """Return how often each id occurs in the training split of each domain (int64 [D, V])."""
        domains = sorted({segment.domain for shard in self.shards for segment in shard.segments})
        try:
            require_size(len(domains), vocab_size)
        except ValueError as error:
            raise UsageError(f"task.data.domain_column: {error}; give another column, or none") from error
        counts_DV = np.zeros((len(domains), vocab_size), dtype=np.int64)
        token_type = "<u2" if vocab_size <= 1 << 16 else "<u4"
        for number, shard in enumerate(self.shards):
            tokens_N = np.memmap(self.options.out / shard_file("tokens", number), dtype=token_type, mode="r")
            for start, segment in shard.starts():
                for begin in range(start, start + segment.num_tokens, CHUNK) if segment.split == "train" else ():
                    chunk_N = tokens_N[begin : min(begin + CHUNK, start + segment.num_tokens)]
                    counts_DV[domains.index(segment.domain)] += np.bincount(chunk_N, minlength=vocab_size)
        return counts_DV


@contextmanager
def _digest_ahead(source: CorpusSource) -> Iterator[Future[str]]:
    """Compute the digest of a source, which reads all of it, in a thread; after an error, stop after a file."""
    is_stopped = Event()
    with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
        try:
            yield pool.submit(source.digest, is_stopped.is_set)
        except BaseException:
            is_stopped.set()
            raise


def _read_tokenizer(name: str) -> bytes:
    """Return the tokenizer.json that a name refers to, which may be on the hub."""
    tokenizer = load_tokenizer(name)  # one that cannot be used is refused before it is copied
    path = tokenizer_file(name)
    return path.read_bytes() if path is not None else tokenizer.to_json().encode()
