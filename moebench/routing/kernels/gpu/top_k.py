"""Scores of all experts, the top k of each token and their weights in one pass over the logits, and its gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moebench.routing.token_choice import SMALLEST_SUM, TopKRule

TILE = 1024
"""Logits per program: 8 for each of its 128 threads, which also hold a score and a key of 8 bytes for each."""
MIN_BLOCK = 16
LOWEST = tl.constexpr(-(2**63))
TINY = tl.constexpr(SMALLEST_SUM)
IS_INTEGER = tl.constexpr(2.0**23)
"""From this value on, every fp32 number is an integer; adding it to a smaller one rounds that half to even."""
RULES = {"scores": 0, "shares": 1, "softmax": 2}
SHARES, SOFTMAX = tl.constexpr(RULES["shares"]), tl.constexpr(RULES["softmax"])


def choose(
    logits_TE: Tensor, rule: TopKRule, ranked_TE: Tensor | None, bias_E: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return expert_TK, weight_TK and scores_TE (see `token_choice.choose_top_k`)."""
    logits_TE = logits_TE.contiguous()
    num_tokens, num_experts = logits_TE.shape
    scores_TE = torch.empty_like(logits_TE)
    expert_TK = logits_TE.new_empty(num_tokens, rule.top_k, dtype=torch.int64)
    weight_TK = logits_TE.new_empty(num_tokens, rule.top_k)
    if num_tokens:
        rows, block = _choose_tile(num_experts)
        with torch.cuda.device_of(logits_TE):  # Triton launches on the current device
            _choose[(triton.cdiv(num_tokens, rows),)](
                logits_TE,
                None if ranked_TE is None else ranked_TE.contiguous(),
                None if bias_E is None else bias_E.contiguous(),
                *(scores_TE, expert_TK, weight_TK, num_tokens, num_experts),
                *(1 / rule.quantum, float(2**62 // num_experts)),  # the limit of keys in `ranking`
                *(rule.top_k, rule.score == "sigmoid", rule.ranks_scores, RULES[rule.weights]),
                K_BLOCK=triton.next_power_of_2(rule.top_k),
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )
    return expert_TK, weight_TK, scores_TE


def choose_backward(
    chosen: tuple[Tensor, Tensor, Tensor], grads: tuple[Tensor | None, Tensor | None], rule: TopKRule
) -> Tensor:
    """Return the gradient of the logits.

    `chosen`: what `choose` returned. `grads`: gradients of weight_TK and scores_TE; None: nothing depends on them.
    """
    expert_TK, weight_TK, scores_TE = chosen
    grad_weight_TK, grad_scores_TE = (None if grad is None else grad.contiguous() for grad in grads)
    num_tokens, num_experts = scores_TE.shape
    grad_logits_TE = torch.empty_like(scores_TE)
    if num_tokens:
        rows, block = _choose_tile(num_experts)
        with torch.cuda.device_of(scores_TE):
            _choose_backward[(triton.cdiv(num_tokens, rows),)](
                *(expert_TK, weight_TK, scores_TE, grad_weight_TK, grad_scores_TE, grad_logits_TE),
                *(num_tokens, num_experts, rule.top_k, rule.score == "sigmoid", RULES[rule.weights]),
                ROWS=rows,
                BLOCK=block,
                num_warps=4,
            )
    return grad_logits_TE


def _choose_tile(num_experts: int) -> tuple[int, int]:
    """Return the number of tokens and of experts of a tile, powers of two; all experts of a token are in one tile."""
    block = max(triton.next_power_of_2(num_experts), MIN_BLOCK)
    return max(TILE // block, 1), block


@triton.jit
def _score(logits, is_expert_1E, SIGMOID: tl.constexpr):
    if SIGMOID:
        power = tl.exp(-tl.abs(logits))  # never overflows
        return tl.where(logits >= 0, 1.0, power) / (1.0 + power)
    power = tl.where(is_expert_1E, tl.exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
    return power / tl.sum(power, axis=1)[:, None]


@triton.jit
def _make_keys(value, expert_1E, per_quantum, limit, BLOCK: tl.constexpr):
    """Return distinct integers that order experts by the rounded value, equal ones by index."""
    multiple = value * per_quantum
    size = tl.abs(multiple)
    size = tl.where(size < IS_INTEGER, (size + IS_INTEGER) - IS_INTEGER, tl.minimum(size, limit))
    rounded = tl.where(multiple < 0, 0.0 - size, size)  # never a negative zero
    bits = rounded.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # of negative values the larger bits are the lower value
    return (ordered.to(tl.int64) << 32) + (BLOCK - 1 - expert_1E)


@triton.jit
def _take_best(
    key, source, column_1K, TOP_K: tl.constexpr, K_BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Return the experts with the highest keys, and their entries of `source`."""
    expert_TK = tl.zeros((ROWS, K_BLOCK), dtype=tl.int64)
    chosen_TK = tl.zeros((ROWS, K_BLOCK), dtype=tl.float32)
    for k in range(TOP_K):
        best_T1 = tl.max(key, axis=1)[:, None]
        is_best = key == best_T1
        expert_TK = tl.where(column_1K == k, BLOCK - 1 - (best_T1 & (BLOCK - 1)), expert_TK)
        chosen_T1 = tl.sum(tl.where(is_best, source, 0.0), axis=1)[:, None]
        chosen_TK = tl.where(column_1K == k, chosen_T1, chosen_TK)
        key = tl.where(is_best, LOWEST, key)
    return expert_TK, chosen_TK


@triton.jit
def _choose(
    logits_ptr,
    ranked_ptr,
    bias_ptr,
    scores_ptr,
    expert_ptr,
    weight_ptr,
    num_tokens,
    num_experts,
    per_quantum,
    limit,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    RANKS_SCORES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token_T = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    expert_1E = tl.arange(0, BLOCK)[None, :]
    is_expert_1E = expert_1E < num_experts
    mask = (token_T < num_tokens)[:, None] & is_expert_1E
    offset = token_T[:, None] * num_experts + expert_1E
    logits = tl.load(logits_ptr + offset, mask=mask, other=0.0)
    logits = tl.where(is_expert_1E, logits, float("-inf"))
    scores = _score(logits, is_expert_1E, SIGMOID)
    tl.store(scores_ptr + offset, scores, mask=mask)
    if ranked_ptr is not None:
        value = tl.load(ranked_ptr + offset, mask=mask, other=0.0)
    elif RANKS_SCORES:
        value = scores
    else:
        value = logits
    if bias_ptr is not None:
        value += tl.load(bias_ptr + expert_1E, mask=is_expert_1E, other=0.0)
    key = tl.where(is_expert_1E, _make_keys(value, expert_1E, per_quantum, limit, BLOCK), LOWEST)
    column_1K = tl.arange(0, K_BLOCK)[None, :]
    source = logits if WEIGHTS == SOFTMAX else scores
    expert_TK, weight_TK = _take_best(key, source, column_1K, TOP_K, K_BLOCK, ROWS, BLOCK)
    is_choice_1K = column_1K < TOP_K
    if WEIGHTS == SOFTMAX:
        weight_TK = _score(tl.where(is_choice_1K, weight_TK, float("-inf")), is_choice_1K, False)
    elif WEIGHTS == SHARES:
        weight_TK = weight_TK / tl.maximum(tl.sum(weight_TK, axis=1), TINY)[:, None]
    entry_TK = token_T[:, None] * TOP_K + column_1K
    mask_TK = (token_T < num_tokens)[:, None] & is_choice_1K
    tl.store(expert_ptr + entry_TK, expert_TK, mask=mask_TK)
    tl.store(weight_ptr + entry_TK, weight_TK, mask=mask_TK)


@triton.jit
def _choose_backward(
    expert_ptr,
    weight_ptr,
    scores_ptr,
    grad_weight_ptr,
    grad_scores_ptr,
    grad_logits_ptr,
    num_tokens,
    num_experts,
    TOP_K: tl.constexpr,
    SIGMOID: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token_T = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_token_T = token_T < num_tokens
    expert_1E = tl.arange(0, BLOCK)[None, :]
    mask = is_token_T[:, None] & (expert_1E < num_experts)
    offset = token_T[:, None] * num_experts + expert_1E
    scores = tl.load(scores_ptr + offset, mask=mask, other=0.0)
    grad = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if grad_scores_ptr is not None:
        grad += tl.load(grad_scores_ptr + offset, mask=mask, other=0.0)
    through_weights = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    if grad_weight_ptr is not None:
        is_chosen = tl.zeros((ROWS, BLOCK), dtype=tl.int1)
        grad_chosen, chosen_weight = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
        for k in range(TOP_K):
            entry_T = token_T * TOP_K + k
            is_expert = expert_1E == tl.load(expert_ptr + entry_T, mask=is_token_T, other=0)[:, None]
            grad_T = tl.load(grad_weight_ptr + entry_T, mask=is_token_T, other=0.0)
            weight_T = tl.load(weight_ptr + entry_T, mask=is_token_T, other=0.0)
            is_chosen = is_chosen | is_expert
            grad_chosen = tl.where(is_expert, grad_T[:, None], grad_chosen)
            chosen_weight = tl.where(is_expert, weight_T[:, None], chosen_weight)
        mean_T1 = tl.sum(grad_chosen * chosen_weight, axis=1)[:, None]
        if WEIGHTS != SHARES and WEIGHTS != SOFTMAX:
            grad += grad_chosen
        elif WEIGHTS == SHARES and SIGMOID:
            total_T1 = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1)[:, None]
            mean_T1 = tl.where(total_T1 >= TINY, mean_T1, 0.0)  # below, weights are divided by a constant
            grad += tl.where(is_chosen, (grad_chosen - mean_T1) / tl.maximum(total_T1, TINY), 0.0)
        else:  # a softmax over the chosen experts, as the share of a softmax is
            through_weights = chosen_weight * (grad_chosen - mean_T1)
    if SIGMOID:
        grad_logits = scores * (1.0 - scores) * grad + through_weights
    else:
        grad_logits = scores * (grad - tl.sum(scores * grad, axis=1)[:, None]) + through_weights
    tl.store(grad_logits_ptr + offset, grad_logits, mask=mask)
