"""Trivial baselines of masked language modelling: n-grams of tokens, from the visible ones before or on both sides."""

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from moebench.tasks.baselines.baseline import TrivialBaseline
from moebench.tasks.baselines.measure import EVAL_BATCH, CodeLength, Values
from moebench.tasks.baselines.ngrams import LEFT, MISSING, TWO_SIDED, NgramModel, max_order, read_context
from moebench.tasks.baselines.stored_text import MAX_TRAINING_TOKENS, describe_counts, read_training_tokens

if TYPE_CHECKING:
    from moebench.tasks.masked_language import MaskedLanguage
    from moebench.tasks.task import Batch

METHODS = {
    (LEFT, 1): ("order-1 n-gram", "token counts"),
    (LEFT, 3): ("order-3 n-gram", "token n-grams (Witten-Bell) from the 2 visible tokens before"),
    (LEFT, 5): ("order-5 n-gram", "token n-grams (Witten-Bell) from the 4 visible tokens before"),
    (TWO_SIDED, 3): ("order-3 two-sided n-gram", "token n-grams (Witten-Bell) from a visible token on each side"),
    (TWO_SIDED, 5): ("order-5 two-sided n-gram", "token n-grams (Witten-Bell) from 2 visible tokens on each side"),
}
"""Offsets and order -> name, meaning."""
REFERENCE = (TWO_SIDED, 3)
P_UNCHANGED = 0.5
"""Fraction of the selected, unmasked positions that show the predicted token; the others show a random one."""


def compute_masked_baselines(task: "MaskedLanguage", split: str) -> list[TrivialBaseline]:
    """Return n-grams of tokens, in the metric of the task.

    The context ends at the first masked token. Where the predicted position shows a token, that token has probability
    1/2 and the n-gram's distribution the rest, since both cases of such positions are equally frequent.
    """
    models = _count_tokens(task)
    methods = [(offsets, order) for offsets, order in METHODS if order <= len(models[offsets].offsets) + 1]
    lengths = CodeLength(task, len(methods))
    for batch in task.eval_batches(split, EVAL_BATCH):
        nats = {offsets: _compute_nats(model, batch, task.mask_id) for offsets, model in models.items()}
        selected_BP = batch.count_BP.numpy() > 0  # type: ignore[union-attr]
        domain_N = np.broadcast_to(batch.domain_B.numpy()[:, None], selected_BP.shape)[selected_BP]
        lengths.add(np.stack([nats[offsets][order - 1] for offsets, order in methods]), domain_N)
        lengths.add_weight(batch)
    counts = describe_counts(task, MAX_TRAINING_TOKENS)
    return [
        TrivialBaseline(
            name=METHODS[method][0],
            meaning=f"{METHODS[method][1]}, {counts}; a visible token at the position itself has probability 1/2",
            values=lengths.values(row),
            is_reference=method == REFERENCE,
        )
        for row, method in enumerate(methods)
    ]


@lru_cache(maxsize=1)
def _count_tokens(task: "MaskedLanguage") -> dict[tuple[int, ...], NgramModel]:
    token_N = np.concatenate(read_training_tokens(task, MAX_TRAINING_TOKENS))
    num_symbols = task.text.vocab_size
    order = max_order(num_symbols, len(LEFT) + 1)
    return {offsets: NgramModel(token_N, num_symbols, offsets[: order - 1]) for offsets in (LEFT, TWO_SIDED)}


def _compute_nats(model: NgramModel, batch: "Batch", mask_id: int) -> Values:
    """Return the code length of each selected token by each order, [orders, N]."""
    shown_BL = batch.input_BL.numpy()
    length = shown_BL.shape[1]
    position_N = np.broadcast_to(np.arange(length), shown_BL.shape).ravel()
    selected_N = batch.count_BP.numpy().ravel() > 0  # type: ignore[union-attr]
    visible_N = np.where(shown_BL == mask_id, MISSING, shown_BL).ravel()
    contexts = [
        read_context(visible_N, position_N, np.full_like(position_N, length), offset)[selected_N]
        for offset in model.offsets
    ]
    target_N, shown_N = batch.target_BP.numpy().ravel()[selected_N], visible_N[selected_N]
    nats_ON = model.compute_nats(target_N, contexts)
    mixed_ON = -np.log(P_UNCHANGED * (shown_N == target_N) + (1 - P_UNCHANGED) * np.exp(-nats_ON))
    return np.where(shown_N == MISSING, nats_ON, mixed_ON)
