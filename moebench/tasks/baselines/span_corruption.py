"""Trivial baselines of span corruption: n-grams of tokens from the text before, and the known distribution of spans."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.measure import EVAL_BATCH, CodeLength, Values
from moebench.tasks.baselines.ngrams import LEFT, NgramModel, max_order, read_context
from moebench.tasks.baselines.stored_text import MAX_TRAINING_TOKENS, describe_counts, read_training_tokens

if TYPE_CHECKING:
    from moebench.tasks.span_corruption import SpanCorruption
    from moebench.tasks.task import Batch

REFERENCE_ORDER = 3
MEANING = (
    "(Witten-Bell); order n predicts a removed token from the n - 1 before it, and the"
    " distribution of spans predicts sentinels"
)


def compute_span_baselines(task: "SpanCorruption", split: str) -> list[TrivialBaseline]:
    """Return n-grams of tokens, in the metric of the task.

    A removed token is predicted from the tokens before it, all of which the decoder has seen or generated; a sentinel
    by the distribution from which spans are drawn.
    """
    model = _count_tokens(task)
    orders = range(1, len(model.offsets) + 2)
    lengths = CodeLength(task, len(orders))
    for batch in task.eval_batches(split, EVAL_BATCH):
        token_BL, is_removed_BL = restore_text(batch, task.first_sentinel, task.start_id)
        length = token_BL.shape[1]
        position_N = np.broadcast_to(np.arange(length), token_BL.shape).ravel()
        size_N, removed_N = np.full_like(position_N, length), is_removed_BL.ravel()
        contexts = [read_context(token_BL.ravel(), position_N, size_N, offset)[removed_N] for offset in model.offsets]
        domain_BL = np.broadcast_to(batch.domain_B.numpy()[:, None], token_BL.shape)
        lengths.add(model.compute_nats(token_BL[is_removed_BL], contexts), domain_BL[is_removed_BL])
        sentinel_B = compute_sentinel_nats(batch.target_BP.numpy() >= task.first_sentinel)
        lengths.add(np.broadcast_to(sentinel_B, (len(orders), len(sentinel_B))), batch.domain_B.numpy())
        lengths.add_weight(batch)
    counts = describe_counts(task, MAX_TRAINING_TOKENS)
    return [
        TrivialBaseline(
            name=f"order-{order} n-gram",
            meaning=f"{counts} {MEANING}",
            values=lengths.values(order - 1),
            is_reference=order == min(REFERENCE_ORDER, len(orders)),
        )
        for order in orders
    ]


@lru_cache(maxsize=1)
def _count_tokens(task: "SpanCorruption") -> NgramModel:
    token_N = np.concatenate(read_training_tokens(task, MAX_TRAINING_TOKENS))
    num_symbols = task.text.vocab_size
    return NgramModel(token_N, num_symbols, LEFT[: max_order(num_symbols, len(LEFT) + 1) - 1])


def restore_text(batch: "Batch", first_sentinel: int, end: int) -> tuple[Values, Values]:
    """Return the text of each window and which of its tokens were removed, both [B, L].

    `end`: the first id after those of sentinels.
    """
    input_BL, target_BP = batch.input_BL.numpy(), batch.target_BP.numpy()
    is_sentinel_BL = (input_BL >= first_sentinel) & (input_BL < end)
    is_sentinel_BP = target_BP >= first_sentinel
    _, at_S = np.nonzero(is_sentinel_BP)
    # Each sentinel but the last stands for the tokens up to the next one.
    span_BS = np.diff(at_S.reshape(len(target_BP), -1), axis=1) - 1
    count_BL = np.ones_like(input_BL)
    count_BL[is_sentinel_BL] = span_BS.ravel()
    token_N, removed_N = (np.repeat(values.ravel(), count_BL.ravel()) for values in (input_BL, is_sentinel_BL))
    token_N[removed_N] = target_BP[~is_sentinel_BP]
    return token_N.reshape(len(input_BL), -1), removed_N.reshape(len(input_BL), -1)


def compute_sentinel_nats(is_sentinel_BP: Values) -> Values:
    """Return the code length of where the spans of each target end, by the distribution that they are drawn from.

    All divisions of the removed tokens into non-empty spans are equally likely. So with r removed tokens and s spans
    left, the span after whose token we are ends with probability C(r-1, s-1) / C(r, s) = s / r. The first and the last
    sentinel, and the token after a sentinel, are certain.
    """
    num_removed, num_spans = int((~is_sentinel_BP[0]).sum()), int(is_sentinel_BP[0].sum()) - 1
    is_next_sentinel_BP, after_token_BP = is_sentinel_BP[:, 1:], ~is_sentinel_BP[:, :-1]
    tokens_left_BP = num_removed - (~is_sentinel_BP).cumsum(1)[:, :-1]
    spans_left_BP = num_spans - is_sentinel_BP.cumsum(1)[:, :-1]
    p_end_BP = np.where(tokens_left_BP > 0, spans_left_BP / np.maximum(tokens_left_BP, 1), 1.0)
    p_BP = np.where(after_token_BP, np.where(is_next_sentinel_BP, p_end_BP, 1 - p_end_BP), 1.0)
    nats_B: Values = -np.log(p_BP).sum(1)
    return nats_B
