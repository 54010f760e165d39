"""Tokens of a text and the windows cut from them: prepared once, cached, and memory-mapped by every run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.cache import Arrays, load_or_create
from moebench.tasks.folders import warn_unread_files
from moebench.tasks.sources import check_held_out, warn
from moebench.tasks.tables import TABLES
from moebench.tasks.text.coverage import Coverage
from moebench.tasks.text.documents import TEXTS, Document, TextDataConfig, load_documents, source_digest
from moebench.tasks.text.kinds import TokenKinds
from moebench.tasks.text.overlap import remove_overlap
from moebench.tasks.text.splits import SPLITS, split_documents
from moebench.tasks.text.tokens import Tokenizer, load_tokenizer

FORMAT = 3
"""Part of the name in the cache: raised when the split, the separators, the files or the checks change."""
KINDS_FORMAT = 1
"""Part of the name of the cached kinds of tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSplit:
    """One split: the token streams of the domains, concatenated, and the W windows that tile them."""

    tokens_N: np.ndarray
    """Token ids (uint16 or uint32), memory-mapped."""
    bytes_N: np.ndarray
    """UTF-8 bytes of each token; 0 for separators."""
    start_W: np.ndarray
    """First token of each window (int64), grouped by domain."""
    domain_W: np.ndarray
    """Domain of each window (int64), an index into `PreparedText.domains`."""
    sequence_length: int
    """Predicted tokens per window; a window has one token more."""

    @property
    def num_windows(self) -> int:
        """Number of windows W."""
        return len(self.start_W)

    def window(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and bytes of windows: two arrays [B, L + 1] (int64)."""
        index_BL1 = self.start_W[index_B][:, None] + np.arange(self.sequence_length + 1)
        tokens_BL1, bytes_BL1 = self.tokens_N[index_BL1], self.bytes_N[index_BL1]
        return np.asarray(tokens_BL1, dtype=np.int64), np.asarray(bytes_BL1, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedText:
    """The three splits of a text source, and its vocabulary."""

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    vocab_size: int
    domains: tuple[str, ...]
    num_held_out: int
    """Number of domains, the last ones, that are in the test split only."""
    digest: str
    """SHA-256 (hex) of the tokens of all splits, independent of the sequence length."""
    token_count_V: np.ndarray
    """Occurrences of each token in the training split (int64)."""
    kinds: TokenKinds
    """Kind of each token."""


def prepare(config: TextDataConfig, cache_dir: Path, sequence_length: int) -> PreparedText:
    """Return the tokens of a source from the cache, computing them first if needed; safe in parallel processes.

    Raises UsageError for a source that cannot be read, for a domain that is shorter than one window, for held-out
    domains that the source lacks, and for a tokenizer that loses text.
    """
    if sequence_length < 1:
        raise UsageError(f"sequence length: {sequence_length} was given; allowed: at least 1")
    source = source_digest(config)[:24]
    text = load_or_create(cache_dir / f"text-{source}-{FORMAT}", lambda: _encode_source(config))
    # Separate from the text, whose digest is part of the cell id: kinds of tokens only serve analyses.
    _, kinds = load_or_create(cache_dir / f"kinds-{source}-{KINDS_FORMAT}", lambda: ({}, _compute_kinds(config)))
    return _to_prepared(*text, TokenKinds.from_arrays(kinds), sequence_length)


def train_window_indices(num_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the windows of one training step (int64 [batch_size]), a function of the arguments only.

    Sample i = step * batch_size + j is at position i % num_windows in the order of epoch i // num_windows.
    """
    sample_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch_B, position_B = np.divmod(sample_B, num_windows)
    index_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(epoch_B[0], epoch_B[-1] + 1):
        in_epoch_B = epoch_B == epoch
        index_B[in_epoch_B] = _epoch_order(num_windows, seed, epoch)[position_B[in_epoch_B]]
    return index_B


def evaluation_windows(split: TextSplit, per_domain: int | None) -> np.ndarray:
    """Return evenly spaced windows (int64): `per_domain` of each domain, all if None or if it has fewer."""
    if per_domain is not None and per_domain < 1:
        raise UsageError(f"evaluation windows per domain: {per_domain} was given; allowed: 1 or more, null")
    chosen = []
    for domain in np.unique(split.domain_W):
        index_W = np.flatnonzero(split.domain_W == domain)
        count = len(index_W) if per_domain is None else min(per_domain, len(index_W))
        chosen.append(index_W[np.arange(count) * len(index_W) // count])
    return np.concatenate(chosen)


@lru_cache(maxsize=4)
def _epoch_order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order_W = generator.permutation(num_windows)
    order_W.flags.writeable = False  # it is shared by all callers
    return order_W


def _to_prepared(
    meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], kinds: TokenKinds, sequence_length: int
) -> PreparedText:
    domains = tuple(meta["domains"])
    splits = {name: _windows(name, domains, meta["lengths"][name], arrays, sequence_length) for name in SPLITS}
    return PreparedText(
        **splits,
        vocab_size=meta["vocab_size"],
        domains=domains,
        num_held_out=len(domains) - len(meta["lengths"]["train"]),
        digest=meta["digest"],
        token_count_V=np.asarray(arrays["token_count"]),
        kinds=kinds,
    )


def _windows(
    name: str,
    domains: Sequence[str],
    lengths: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    sequence_length: int,
) -> TextSplit:
    starts, begin = [], 0
    for domain, length in zip(
        domains[: len(lengths)], lengths, strict=True
    ):  # held-out ones are in the test split only
        count = (length - 1) // sequence_length  # a window has one token more than it predicts
        if count < 1:
            raise UsageError(
                f"task.data: domain '{domain}' has {length} tokens of {name} text, less than one window of "
                f"{sequence_length + 1}; use a shorter sequence, more text, or task.data.domain_column=null"
            )
        starts.append(begin + sequence_length * np.arange(count, dtype=np.int64))
        begin += length
    return TextSplit(
        tokens_N=arrays[f"{name}-tokens"],
        bytes_N=arrays[f"{name}-bytes"],
        start_W=np.concatenate(starts),
        domain_W=np.repeat(np.arange(len(starts), dtype=np.int64), [len(start) for start in starts]),
        sequence_length=sequence_length,
    )


def _encode_source(config: TextDataConfig) -> tuple[dict[str, Any], Arrays]:
    tokenizer = load_tokenizer(config.tokenizer)
    documents = split_documents(load_documents(config))
    warn_unread_files(config.path, (*TABLES, *TEXTS))
    known = sorted({document.domain for split in documents.values() for document in split})
    held_out = check_held_out(config.held_out_domains, known)
    trained = [domain for domain in known if domain not in held_out]
    domains = [*trained, *held_out]
    documents = {
        name: [d for d in members if name == "test" or d.domain not in held_out] for name, members in documents.items()
    }
    meta: dict[str, Any] = {}
    if config.remove_overlap:
        documents, meta["overlap"] = remove_overlap(documents)
    else:
        _warn_repeated(documents)
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    arrays: dict[str, np.ndarray] = {}
    coverage = {domain: Coverage() for domain in domains}
    lengths = {}
    for name in SPLITS:
        split_domains = domains if name == "test" else trained
        members = {domain: [d for d in documents[name] if d.domain == domain] for domain in split_domains}
        streams = [_encode(parts, tokenizer, coverage[domain]) for domain, parts in members.items()]
        tokens_N, bytes_N = (np.concatenate(parts) for parts in zip(*streams, strict=True))
        arrays[f"{name}-tokens"] = tokens_N.astype(token_type)
        arrays[f"{name}-bytes"] = bytes_N.astype(np.min_scalar_type(int(bytes_N.max(initial=0))))
        lengths[name] = [len(tokens) for tokens, _ in streams]
        if name == "train":
            arrays["token_count"] = np.bincount(tokens_N, minlength=tokenizer.vocab_size).astype(np.int64)
    for domain in domains:
        coverage[domain].check(config.tokenizer, domain)
    return {"vocab_size": tokenizer.vocab_size, "domains": domains, "lengths": lengths, **meta}, arrays


def _compute_kinds(config: TextDataConfig) -> Arrays:
    return TokenKinds.from_pieces(load_tokenizer(config.tokenizer).pieces()).arrays()


def _warn_repeated(documents: Mapping[str, Sequence[Document]]) -> None:
    """Print how many validation and test documents are in the training split, which a source with splits may have."""
    trained = {document.text for document in documents["train"]} - {""}  # parts of a very short text are empty
    for name in SPLITS[1:]:
        repeated = sum(document.text in trained for document in documents[name])
        if repeated:
            warn(f"{repeated} of {len(documents[name])} {name} documents are also in the training split, word for word")


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, coverage: Coverage) -> tuple[np.ndarray, np.ndarray]:
    """Return token_N and byte_count_N of documents, concatenated, each preceded by a separator."""
    tokens, counts = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for document in documents:
        token_N, count_N = tokenizer.encode(document.text)
        coverage.add(document.text, tokenizer.decode(token_N))
        if len(token_N):
            tokens += [np.array([tokenizer.separator]), token_N]
            counts += [np.array([0]), count_N]
    return np.concatenate(tokens), np.concatenate(counts)
