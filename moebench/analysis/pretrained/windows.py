"""Sequences of a model's own tokens, cut from documents, with equal shares of all domains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.pretrained.texts import BYTES_PER_TOKEN
from moebench.errors import UsageError
from moebench.pretrained.tokenizer import PretrainedTokenizer
from moebench.seeds import make_generator
from moebench.tasks.span_corruption import corrupt, noise_mask
from moebench.tasks.text.document import Document

NOISE_DENSITY, MEAN_SPAN = 0.15, 3.0
"""T5's span corruption (arXiv:1910.10683, section 3.1.4)."""
FEWEST_TOKENS = 4
"""Shorter ends of documents are left out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Token ids of sequences, padded on the right."""

    token_BL: Tensor
    """int64 [B, L]; 0 at padding."""
    is_valid_BL: Tensor
    """Whether a position has a token: False at padding."""
    is_text_BL: Tensor
    """Whether a position counts in the tables: tokens of the text and sentinels, no other special tokens."""

    def slice(self, first: int, size: int) -> "TokenBatch":
        """Return some of the sequences, without the columns where all of them are padded."""
        rows = slice(first, first + size)
        width = int(self.is_valid_BL[rows].sum(1).max())
        return TokenBatch(
            token_BL=self.token_BL[rows, :width],
            is_valid_BL=self.is_valid_BL[rows, :width],
            is_text_BL=self.is_text_BL[rows, :width],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeText:
    """What a model reads: one sequence for each window of text, and a second one for a decoder."""

    main: TokenBatch
    """Of the only stack, or of the encoder."""
    decoder: TokenBatch | None
    domain_B: Tensor
    """Domain of each sequence (int64), an index into `domains`."""
    domains: tuple[str, ...]

    def half(self, name: str | None) -> TokenBatch:
        """Return the tokens that a stack of the model reads."""
        return self.decoder if name == "decoder" and self.decoder is not None else self.main


def cut_windows(
    documents: Sequence[Document], tokenizer: PretrainedTokenizer, *, length: int, max_tokens: int
) -> tuple[list[np.ndarray], list[int], tuple[str, ...]]:
    """Return windows of at most `length` tokens of text, the domain of each, and the names of the domains.

    Domains take turns, and in a domain its documents, until `max_tokens` are reached or the text ends. Raises
    UsageError for text without a window.
    """
    domains = tuple(sorted({document.domain for document in documents}))
    sources = [
        _take_turns([_cut(d.text, tokenizer, length, max_tokens) for d in documents if d.domain == domain])
        for domain in domains
    ]
    windows: list[np.ndarray] = []
    domain_B: list[int] = []
    num_tokens = 0
    for row in zip_longest(*sources):
        for domain, window in enumerate(row):
            if window is None or num_tokens >= max_tokens:
                continue
            window = window[: max_tokens - num_tokens]
            if len(window) < FEWEST_TOKENS:
                continue
            windows.append(window)
            domain_B.append(domain)
            num_tokens += len(window)
        if num_tokens >= max_tokens:
            break
    if not windows:
        raise UsageError(f"--data: the text has no sequence of at least {FEWEST_TOKENS} tokens")
    return windows, domain_B, domains


def _cut(text: str, tokenizer: PretrainedTokenizer, length: int, max_tokens: int) -> Iterator[np.ndarray]:
    token_N = tokenizer.encode(text[: BYTES_PER_TOKEN * max_tokens])
    for start in range(0, len(token_N), length):
        if len(token_N) - start >= FEWEST_TOKENS:
            yield token_N[start : start + length]


def _take_turns(sources: Sequence[Iterator[np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield the first item of each source, then the second of each, and so on; sources are begun when they are due."""
    remaining = list(sources)
    while remaining:
        still = []
        for source in remaining:
            items = list(islice(source, 1))
            if items:
                yield items[0]
                still.append(source)
        remaining = still


def build_causal(windows: Sequence[np.ndarray], tokenizer: PretrainedTokenizer) -> TokenBatch:
    """Return the windows with the special tokens of the tokenizer around them."""
    return _pad([_surround(window, tokenizer.prefix, tokenizer.suffix) for window in windows])


def build_encoder_decoder(
    windows: Sequence[np.ndarray], tokenizer: PretrainedTokenizer, start_id: int
) -> tuple[TokenBatch, TokenBatch]:
    """Return what encoder and decoder read: windows with spans removed, and the removed spans.

    Without sentinels in the vocabulary, the encoder reads the first half of a window and the decoder the second.
    """
    encoder, decoder = [], []
    for index, window in enumerate(windows):
        read, target = _corrupt(window, tokenizer.sentinels, index) if tokenizer.sentinels else _halve(window)
        encoder.append(_surround(read, (), tokenizer.suffix))
        decoder.append(_surround(target[:-1], (start_id,), ()))
    return _pad(encoder), _pad(decoder)


def _corrupt(window: np.ndarray, sentinels: Sequence[int], index: int) -> tuple[np.ndarray, np.ndarray]:
    length = len(window)
    num_noise = min(max(round(length * NOISE_DENSITY), 1), length - 1)
    num_spans = min(max(round(num_noise / MEAN_SPAN), 1), len(sentinels) - 1, num_noise, length - num_noise)
    if num_spans < 1:
        return _halve(window)
    generator = make_generator("probe spans", index)
    noise_BL = noise_mask(length, num_noise, num_spans, lambda n: torch.rand(1, n, generator=generator))
    token_BL = torch.from_numpy(window[None])
    first = int(window.max()) + 1  # ids from here on stand for sentinels
    parts = corrupt(token_BL, torch.ones_like(token_BL), noise_BL, first)[:2]
    names = np.array(sentinels[: num_spans + 1])
    encoder_N, target_N = (part[0].numpy() for part in parts)
    return _name_sentinels(encoder_N, first, names), _name_sentinels(target_N, first, names)


def _name_sentinels(token_N: np.ndarray, first: int, names: np.ndarray) -> np.ndarray:
    is_sentinel_N = token_N >= first
    return np.where(is_sentinel_N, names[np.where(is_sentinel_N, token_N - first, 0)], token_N)


def _halve(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = len(window) // 2
    return window[:middle], window[middle:]


def _surround(window: np.ndarray, prefix: Sequence[int], suffix: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids with special ones around them, and which of them are text."""
    token_N = np.concatenate([np.array(prefix, np.int64), window, np.array(suffix, np.int64)])
    is_text_N = np.zeros(len(token_N), dtype=bool)
    is_text_N[len(prefix) : len(prefix) + len(window)] = True
    return token_N, is_text_N


def _pad(sequences: Sequence[tuple[np.ndarray, np.ndarray]]) -> TokenBatch:
    shape = len(sequences), max(len(token_N) for token_N, _ in sequences)
    token_BL, is_valid_BL, is_text_BL = (np.zeros(shape, dtype=kind) for kind in (np.int64, bool, bool))
    for row, (token_N, is_text_N) in enumerate(sequences):
        token_BL[row, : len(token_N)], is_text_BL[row, : len(token_N)] = token_N, is_text_N
        is_valid_BL[row, : len(token_N)] = True
    return TokenBatch(
        token_BL=torch.from_numpy(token_BL),
        is_valid_BL=torch.from_numpy(is_valid_BL),
        is_text_BL=torch.from_numpy(is_text_BL),
    )
