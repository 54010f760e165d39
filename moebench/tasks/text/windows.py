"""Tokens on disk and the windows cut from them: prepared once, then read in place by every run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from moebench.errors import UsageError
from moebench.tasks.cache import Arrays, stored
from moebench.tasks.folders import tell_unread
from moebench.tasks.sources import checked_held_out, note
from moebench.tasks.tables import TABLES
from moebench.tasks.text.coverage import Coverage
from moebench.tasks.text.documents import TEXTS, Document, TextDataConfig, load_documents, source_digest
from moebench.tasks.text.kinds import TokenKinds
from moebench.tasks.text.splits import SPLITS, split_documents
from moebench.tasks.text.tokens import Tokenizer, load_tokenizer

FORMAT = 3  # raise it when the split, the separators, the files or what is refused change
KINDS_FORMAT = 1  # raise it when the kinds of tokens change


@dataclass(frozen=True, kw_only=True, eq=False)
class TextSplit:
    """One split: a token stream per domain, laid one after the other, and the windows W that tile them."""

    tokens_N: np.ndarray
    """Token ids, uint16 or uint32, read in place from disk."""
    bytes_N: np.ndarray
    """UTF-8 bytes of each token; 0 for separators."""
    start_W: np.ndarray
    """First token of each window (int64), grouped by domain."""
    domain_W: np.ndarray
    """Index of each window's domain in `PreparedText.domains` (int64)."""
    sequence_length: int
    """Tokens that a window predicts; it holds one more."""

    @property
    def num_windows(self) -> int:
        """Number of windows W."""
        return len(self.start_W)

    def window(self, index_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens_BL1 and bytes_BL1 (int64), L + 1 of each per window."""
        at_BL1 = self.start_W[index_B][:, None] + np.arange(self.sequence_length + 1)
        tokens_BL1, bytes_BL1 = self.tokens_N[at_BL1], self.bytes_N[at_BL1]
        return np.asarray(tokens_BL1, dtype=np.int64), np.asarray(bytes_BL1, dtype=np.int64)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreparedText:
    """The three splits of a text source and what models must know of its vocabulary."""

    train: TextSplit
    validation: TextSplit
    test: TextSplit
    vocab_size: int
    domains: tuple[str, ...]
    num_held_out: int
    """How many domains, the last of them, are in the test split alone."""
    digest: str
    """SHA-256 (hex) of the tokens of all splits; it does not depend on the sequence length."""
    token_count_V: np.ndarray
    """How often each token stands in the training split (int64)."""
    kinds: TokenKinds
    """Which tokens begin words, are numbers, and so on."""


def prepare(config: TextDataConfig, cache_dir: Path, sequence_length: int) -> PreparedText:
    """Return the tokens of a source, from the cache or else made now and cached; safe in parallel processes.

    Raises `UsageError` for a source that cannot be read, one whose domains are shorter than one window, domains to hold
    out that it does not have, and a tokenizer that loses a part of it.
    """
    if sequence_length < 1:
        raise UsageError(f"sequence length: {sequence_length} was given; allowed: at least 1")
    source = source_digest(config)[:24]
    text = stored(cache_dir / f"text-{source}-{FORMAT}", lambda: _encoded(config))
    # Apart from the text, whose digest decides what a cell is: its kinds of tokens are for looking at alone.
    _, kinds = stored(cache_dir / f"kinds-{source}-{KINDS_FORMAT}", lambda: ({}, _kinds(config)))
    return _prepared(*text, TokenKinds.of_arrays(kinds), sequence_length)


def train_window_indices(num_windows: int, batch_size: int, seed: int, step: int) -> np.ndarray:
    """Return the windows of one training step (int64, batch_size of them), without any state to resume.

    Sample i = step * batch_size + j is place i % num_windows of the order of epoch i // num_windows.
    """
    sample_B = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epoch_B, place_B = np.divmod(sample_B, num_windows)
    index_B = np.empty(batch_size, dtype=np.int64)
    for epoch in range(epoch_B[0], epoch_B[-1] + 1):
        mask_B = epoch_B == epoch
        index_B[mask_B] = _order(num_windows, seed, epoch)[place_B[mask_B]]
    return index_B


def evaluation_windows(split: TextSplit, per_domain: int | None) -> np.ndarray:
    """Return evenly spaced windows (int64): `per_domain` of each domain, all for None or if it has fewer."""
    if per_domain is not None and per_domain < 1:
        raise UsageError(f"evaluation windows per domain: {per_domain} was given; allowed: 1 or more, null")
    chosen = []
    for domain in np.unique(split.domain_W):
        index_W = np.flatnonzero(split.domain_W == domain)
        count = len(index_W) if per_domain is None else min(per_domain, len(index_W))
        chosen.append(index_W[np.arange(count) * len(index_W) // count])
    return np.concatenate(chosen)


@lru_cache(maxsize=4)
def _order(num_windows: int, seed: int, epoch: int) -> np.ndarray:
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    order_W = generator.permutation(num_windows)
    order_W.flags.writeable = False  # it is shared by all callers
    return order_W


def _prepared(
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
    for domain, length in zip(domains[: len(lengths)], lengths, strict=True):  # held out: in the test split alone
        count = (length - 1) // sequence_length  # a window holds one token more than it predicts
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


def _encoded(config: TextDataConfig) -> tuple[dict[str, Any], Arrays]:
    tokenizer = load_tokenizer(config.tokenizer)
    documents = split_documents(load_documents(config))
    tell_unread(config.path, (*TABLES, *TEXTS))
    known = sorted({document.domain for split in documents.values() for document in split})
    held_out = checked_held_out(config.held_out_domains, known)
    trained = [domain for domain in known if domain not in held_out]
    domains = [*trained, *held_out]
    documents = {
        name: [d for d in found if name == "test" or d.domain not in held_out] for name, found in documents.items()
    }
    _tell_repeated(documents)
    token_type = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    arrays: dict[str, np.ndarray] = {}
    coverage = {domain: Coverage() for domain in domains}
    lengths = {}
    for name in SPLITS:
        present = domains if name == "test" else trained
        members = {domain: [d for d in documents[name] if d.domain == domain] for domain in present}
        streams = [_stream(parts, tokenizer, coverage[domain]) for domain, parts in members.items()]
        tokens_N, bytes_N = (np.concatenate(parts) for parts in zip(*streams, strict=True))
        arrays[f"{name}-tokens"] = tokens_N.astype(token_type)
        arrays[f"{name}-bytes"] = bytes_N.astype(np.min_scalar_type(int(bytes_N.max(initial=0))))
        lengths[name] = [len(tokens) for tokens, _ in streams]
        if name == "train":
            arrays["token_count"] = np.bincount(tokens_N, minlength=tokenizer.vocab_size).astype(np.int64)
    for domain in domains:
        coverage[domain].check(config.tokenizer, domain)
    return {"vocab_size": tokenizer.vocab_size, "domains": domains, "lengths": lengths}, arrays


def _kinds(config: TextDataConfig) -> Arrays:
    return TokenKinds.of_pieces(load_tokenizer(config.tokenizer).pieces()).arrays()


def _tell_repeated(documents: Mapping[str, Sequence[Document]]) -> None:
    """Say on standard error how much of what is held out is trained on too: only the source itself can do that."""
    trained = {document.text for document in documents["train"]} - {""}  # of a short text no part is left
    for name in SPLITS[1:]:
        repeated = sum(document.text in trained for document in documents[name])
        if repeated:
            note(f"{repeated} of {len(documents[name])} {name} documents are trained on too, word for word")


def _stream(documents: Sequence[Document], tokenizer: Tokenizer, coverage: Coverage) -> tuple[np.ndarray, np.ndarray]:
    """Return token_N and byte_count_N of documents one after the other, each led in by a separator."""
    tokens, counts = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for document in documents:
        token_N, count_N = tokenizer.encode(document.text)
        coverage.add(document.text, tokenizer.decode(token_N))
        if len(token_N):
            tokens += [np.array([tokenizer.separator]), token_N]
            counts += [np.array([0]), count_N]
    return np.concatenate(tokens), np.concatenate(counts)
