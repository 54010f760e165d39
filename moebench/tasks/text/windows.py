"""Tokens of a text and the windows cut from them: prepared once, cached, and memory-mapped by every run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError, require
from moebench.tasks.cache import Arrays, load_or_create
from moebench.tasks.folders import warn_unread_files
from moebench.tasks.sources import check_held_out, warn
from moebench.tasks.tables import TABLES
from moebench.tasks.text.coverage import Coverage
from moebench.tasks.text.document import Document
from moebench.tasks.text.encoding import encode_documents
from moebench.tasks.text.kinds import TokenKinds
from moebench.tasks.text.overlap import remove_overlap, sum_removed
from moebench.tasks.text.shuffling import EpochOrder, order_by_cipher, order_by_permutation
from moebench.tasks.text.sources import TEXTS, TextDataConfig, load_documents, source_digest
from moebench.tasks.text.splits import SPLITS, split_documents
from moebench.tasks.text.token_stream import TokenStream
from moebench.tasks.text.tokens import Tokenizer, load_tokenizer

FORMAT = 4
"""Part of the name in the cache: raised when the split, the separators, the files or the checks change."""
KINDS_FORMAT = 1
"""Part of the name of the cached kinds of tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSplit:
    """One split: the token streams of the D domains, one after another, and the windows that tile them."""

    tokens: TokenStream
    """Token ids, memory-mapped."""
    bytes: TokenStream | np.ndarray
    """UTF-8 bytes of each token of the stream, or of each id of the vocabulary [V]; 0 for separators."""
    length_D: np.ndarray
    """Tokens of each domain (int64), in the order of `PreparedText.domains`."""
    sequence_length: int
    """Predicted tokens per window; a window has one token more."""
    order: EpochOrder = order_by_permutation
    """Order of the windows in an epoch of training."""

    @cached_property
    def windows_D(self) -> np.ndarray:
        """Number of windows of each domain (int64)."""
        windows_D: np.ndarray = np.maximum(self.length_D - 1, 0) // self.sequence_length
        return windows_D

    @property
    def num_windows(self) -> int:
        """Number of windows of all domains."""
        return int(self.windows_D.sum())

    @property
    def tokens_N(self) -> np.ndarray:
        """All tokens; a copy in memory where they lie in several files."""
        parts = self.tokens.parts
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def list_domains(self) -> list[tuple[int, int, int]]:
        """Return each domain that has tokens, with its first token in the stream and the end of its tokens."""
        end_D = self.length_D.cumsum()
        bounds = zip((end_D - self.length_D).tolist(), end_D.tolist(), strict=True)
        return [(domain, start, end) for domain, (start, end) in enumerate(bounds) if end > start]

    def domain_of(self, index_B: np.ndarray) -> np.ndarray:
        """Return the domain of each window (int64), an index into `PreparedText.domains`."""
        return np.searchsorted(self.windows_D.cumsum(), index_B, side="right")

    def start_of(self, index_B: np.ndarray) -> np.ndarray:
        """Return the first token of each window (int64)."""
        domain_B = self.domain_of(index_B)
        first_D = self.windows_D.cumsum() - self.windows_D
        start_D = self.length_D.cumsum() - self.length_D
        start_B: np.ndarray = start_D[domain_B] + (index_B - first_D[domain_B]) * self.sequence_length
        return start_B

    def window(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and bytes of windows: two arrays [B, L + 1] (int64)."""
        start_B, length = self.start_of(index_B), self.sequence_length + 1
        token_BM = self.tokens.gather(start_B, length)
        if isinstance(self.bytes, TokenStream):
            return token_BM, self.bytes.gather(start_B, length)
        require_ids(token_BM, len(self.bytes))
        return token_BM, self.bytes[token_BM].astype(np.int64)


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
    tokenizer_name: str
    """What `load_tokenizer` takes."""
    overlap: Mapping[str, tuple[int, int]] | None = None
    """Domain -> validation and test documents removed because the training split has them, and all; None: unknown."""

    @cached_property
    def separator(self) -> int:
        """Id of the token that begins a document."""
        return self.tokenizer.separator

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded when it is first asked for: training does not need it."""
        return load_tokenizer(self.tokenizer_name)


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
    return _to_prepared(*text, TokenKinds.from_arrays(kinds), sequence_length, config.tokenizer)


def train_window_indices(
    num_windows: int, batch_size: int, seed: int, step: int, order: EpochOrder = order_by_permutation
) -> np.ndarray:
    """Return the windows of one training step (int64 [batch_size]), a function of the arguments only.

    Sample i = step * batch_size + j is at position i % num_windows in the order of epoch i // num_windows.
    """
    sample_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch_B, position_B = np.divmod(sample_B, num_windows)
    index_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(epoch_B[0], epoch_B[-1] + 1):
        in_epoch_B = epoch_B == epoch
        index_B[in_epoch_B] = order(num_windows, seed, epoch, position_B[in_epoch_B])
    return index_B


def select_windows(num_windows: int, number: int | None) -> np.ndarray | None:
    """Return this many windows of a split (int64), those of a smaller number first; None for all of them.

    They are a fixed sample, in the order of a fixed permutation, so that every seed trains on the same ones.
    """
    if number is None:
        return None
    require(number <= num_windows, "task.train_windows", number, f"at most {num_windows}, those of the training split")
    return order_by_cipher(num_windows, 0, 0, np.arange(number, dtype=np.int64))


def evaluation_windows(split: TextSplit, per_domain: int | None) -> np.ndarray:
    """Return evenly spaced windows (int64): `per_domain` of each domain, all if None or if it has fewer."""
    if per_domain is not None and per_domain < 1:
        raise UsageError(f"evaluation windows per domain: {per_domain} was given; allowed: 1 or more, null")
    chosen, first = [], 0
    for total in split.windows_D.tolist():
        count = total if per_domain is None else min(per_domain, total)
        chosen.append(first + np.arange(count, dtype=np.int64) * total // max(count, 1))
        first += total
    return np.concatenate(chosen)


def _to_prepared(
    meta: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    kinds: TokenKinds,
    sequence_length: int,
    tokenizer_name: str,
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
        tokenizer_name=tokenizer_name,
        overlap=sum_removed(meta["overlap"]) if "overlap" in meta else None,
    )


def _windows(
    name: str,
    domains: Sequence[str],
    lengths: Sequence[int],
    arrays: Mapping[str, np.ndarray],
    sequence_length: int,
) -> TextSplit:
    for domain, length in zip(domains, lengths, strict=False):  # held-out ones are in the test split only
        if length <= sequence_length:  # a window has one token more than it predicts
            subject = "the text has" if list(domains) == ["all"] else f"domain '{domain}' has"
            remedy = ", more text, or task.data.domain_column=null" if len(domains) > 1 else ", or more text"
            raise UsageError(
                f"task.data: {subject} {length} tokens of {name} text, less than one window of "
                f"{sequence_length + 1}; use a shorter sequence{remedy}"
            )
    return TextSplit(
        tokens=TokenStream([arrays[f"{name}-tokens"]]),
        bytes=TokenStream([arrays[f"{name}-bytes"]]),
        length_D=np.array(lengths, dtype=np.int64),
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
        streams = [_encode(parts, tokenizer, coverage[domain], token_type) for domain, parts in members.items()]
        lengths[name] = [len(tokens) for tokens, _ in streams]
        # The types of the byte counts are the smallest ones, and so is the type of all.
        for kind, parts in zip(("tokens", "bytes"), zip(*streams, strict=True), strict=True):
            arrays[f"{name}-{kind}"] = np.concatenate(parts)
        del streams
        if name == "train":
            stream = TokenStream([arrays[f"{name}-tokens"]])
            counts = (np.bincount(chunk, minlength=tokenizer.vocab_size) for chunk in stream.chunks())
            arrays["token_count"] = sum(counts, start=np.zeros(tokenizer.vocab_size, dtype=np.int64))
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


def _encode(
    documents: Sequence[Document], tokenizer: Tokenizer, coverage: Coverage, token_type: type[np.unsignedinteger[Any]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return token_N and byte_count_N of documents, concatenated, each preceded by a separator."""
    tokens, counts = [np.empty(0, dtype=token_type)], [np.empty(0, dtype=np.uint8)]
    for document in encode_documents(documents, tokenizer):
        coverage.merge(document.coverage)
        if len(document.token_N):
            tokens += [np.array([tokenizer.separator], dtype=token_type), document.token_N.astype(token_type)]
            smallest = np.min_scalar_type(int(document.count_N.max()))
            counts += [np.zeros(1, dtype=np.uint8), document.count_N.astype(smallest)]
    return np.concatenate(tokens), np.concatenate(counts)


def require_ids(token_BM: np.ndarray, vocab_size: int) -> None:
    """Raise UsageError for tokens that the vocabulary does not have: their file was damaged or made so."""
    if token_BM.size and token_BM.max() >= vocab_size:
        raise UsageError(
            f"task.data.path: its tokens have the id {token_BM.max()}, and its vocabulary ends at {vocab_size - 1};"
            " `moebench verify` of the folder names the file, `moebench prepare` makes it again"
        )
