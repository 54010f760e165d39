"""Trivial baselines of next-token prediction: n-grams of bytes, and compressors."""

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.compressors import COMPRESSORS, MAX_BYTES, compute_bits_per_byte
from moebench.tasks.baselines.measure import EVAL_BATCH, CodeLength, Values
from moebench.tasks.baselines.ngrams import LEFT, NgramModel, read_context
from moebench.tasks.baselines.stored_text import (
    NUM_BYTE_SYMBOLS,
    ByteSymbols,
    describe_counts,
    find_byte_limit,
    read_byte_symbols,
    read_domain_text,
    read_training_bytes,
)

if TYPE_CHECKING:
    from moebench.tasks.language import TextTask
    from moebench.tasks.task import Batch

REFERENCE_ORDER = 3
MEANING = "(Witten-Bell); order n predicts a byte from the n - 1 before it in the window"


def compute_language_baselines(task: "TextTask", split: str) -> list[TrivialBaseline]:
    """Return byte n-grams of orders 1 to 5 and three compressors, in bits per byte.

    N-grams predict the bytes that the windows of the evaluation predict, from the bytes before them in the window, and
    separators between documents like another byte: what a model's code length contains too.
    """
    symbols, model = _count_bytes(task)
    lengths = CodeLength(task, len(LEFT) + 1)
    for batch in task.eval_batches(split, EVAL_BATCH):
        target_N, context_CN, domain_N = _read_predicted_bytes(batch, symbols)
        lengths.add(model.compute_nats(target_N, context_CN), domain_N)
        lengths.add_weight(batch)
    counts = describe_counts(task, find_byte_limit(task, symbols))
    ngrams = [
        TrivialBaseline(
            name=f"order-{order} n-gram",
            meaning=f"{counts} {MEANING}",
            values=lengths.values(order - 1),
            is_reference=order == REFERENCE_ORDER,
        )
        for order in range(1, len(LEFT) + 2)
    ]
    return [*ngrams, *_compress(task, split, symbols, lengths.weight_D)]


def _compress(task: "TextTask", split: str, symbols: ByteSymbols, weight_D: Values) -> list[TrivialBaseline]:
    """Return the compressors: each domain's text by itself, averaged over domains with the weights of the metric."""
    texts = read_domain_text(task, split, symbols, max(MAX_BYTES // len(task.domains), 1))
    lengths = CodeLength(task, len(COMPRESSORS))
    lengths.weight_D = weight_D
    for row, name in enumerate(COMPRESSORS):
        bits_D = np.array([compute_bits_per_byte(name, text) for text in texts])
        lengths.nats_MD[row] = bits_D * weight_D * math.log(2)
    return [
        TrivialBaseline(
            name=name, meaning="the whole text of each domain, compressed alone", values=lengths.values(row)
        )
        for row, name in enumerate(COMPRESSORS)
    ]


@lru_cache(maxsize=1)
def _count_bytes(task: "TextTask") -> tuple[ByteSymbols, NgramModel]:
    """Count once for both splits."""
    symbols = read_byte_symbols(task)
    return symbols, NgramModel(read_training_bytes(task, symbols), NUM_BYTE_SYMBOLS)


def _read_predicted_bytes(batch: "Batch", symbols: ByteSymbols) -> tuple[Values, list[Values], Values]:
    """Return the bytes that windows predict, the bytes before each of them in its window, and its domain.

    The first token of a window is context.
    """
    token_BM = torch.cat([batch.input_BL[:, :1], batch.target_BP], dim=1).numpy()
    length_BM = symbols.length_V[token_BM]
    symbol_S = symbols.encode(token_BM.ravel()).astype(np.int64)
    length_B = length_BM.sum(1)
    position_S = np.arange(len(symbol_S)) - np.repeat(np.cumsum(length_B) - length_B, length_B)
    length_S = np.repeat(length_B, length_B)
    is_predicted_S = position_S >= np.repeat(length_BM[:, 0], length_B)
    contexts = [read_context(symbol_S, position_S, length_S, offset)[is_predicted_S] for offset in LEFT]
    return symbol_S[is_predicted_S], contexts, np.repeat(batch.domain_B.numpy(), length_B)[is_predicted_S]
