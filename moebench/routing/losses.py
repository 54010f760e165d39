"""Auxiliary losses: pure functions of a LayerRecord, without coefficients, normalised in the same way for every router.

At uniform routing a balance loss is 1 (products) or 0 (squared variations) for any number of experts per token. Losses
are computed per layer and averaged over layers: summing over layers, or pooling their statistics, would make the same
coefficient mean different things in different models. Training applies the coefficients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.registry import Registry
from moebench.routing.constants import build_constant_like
from moebench.routing.ranking import SCORE_QUANTUM, rank_top_k
from moebench.routing.reduction import LossValue, reduce_record
from moebench.routing.values import LayerRecord, Routing

Loss = Callable[[LayerRecord], LossValue]


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """The equation of a loss, its source, and its values at the extremes."""

    equation: str
    paper: str
    uniform: str
    """Value at uniform routing."""
    collapsed: str
    """Value when every token goes to the same k experts."""


LOSSES: Registry[Loss, LossFacts] = Registry("loss", None, facts_type=LossFacts)


@LOSSES.register(
    LossFacts(
        equation="E · Σ_e f_e P_e,  f_e = share of assignments, P_e = mean score",
        paper="arXiv:2101.03961, eq. 4-6",
        uniform="1",
        collapsed="E / k",
    ),
    name="load_balance",
)
def load_balance(record: LayerRecord) -> LossValue:
    """Switch's load-balance loss: 1 at uniform routing for every k, E/k when k experts take all tokens.

    f counts assignments before capacity and has no gradient. Where a paper counts f as assignments per token (it then
    sums to k), the coefficient here is k times the paper's. Can be below 1, where f and P disagree.
    """
    scores_TE = _require_table(record.routing.scores_TE, "load_balance", "scores")
    num_experts = record.routing.num_experts

    def formula(load_E: Tensor, mean_E: Tensor) -> Tensor:
        return num_experts * torch.dot(load_E / load_E.sum().clamp(min=1), mean_E)

    score_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    return reduce_record(record, formula, totals=[record.routing.load_E.to(scores_TE.dtype)], means=[score_TE])


@LOSSES.register(
    LossFacts(
        equation="mean over sequences of E · Σ_e f_se P_se,  f and P counted within sequence s",
        paper="arXiv:2412.19437, eq. 17-20",
        uniform="1",
        collapsed="E / k",
    ),
    name="sequence_balance",
)
def sequence_balance(record: LayerRecord) -> LossValue:
    """`load_balance` within each sequence: also penalises sequences that are unbalanced in turn.

    Where lengths differ, a sequence is weighted by its number of tokens. f counts assignments; routers that select with
    a bias pass a record recounted without it, as in eq. 18 (`recount_by_scores`).
    """
    scores_TE = _require_table(record.routing.scores_TE, "sequence_balance", "scores")
    routing = record.routing
    assert isinstance(routing, Routing)  # soft routing has no scores
    length = record.sequence_length or max(routing.num_tokens, 1)
    sequence_N = routing.token_N // length
    counted_N = routing.counted_N.to(scores_TE.dtype)
    load_SE = scores_TE.new_zeros(routing.num_tokens // length, routing.num_experts)
    load_SE = load_SE.index_put((sequence_N, routing.expert_N), counted_N, accumulate=True)
    share_SE = load_SE / load_SE.sum(-1, keepdim=True).clamp(min=1)
    score_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    valid_T = torch.ones_like(score_TE[:, 0]) if record.valid_T is None else record.valid_T.to(score_TE.dtype)
    summed_SE = (score_TE * valid_T.unsqueeze(-1)).view(-1, length, routing.num_experts).sum(1)
    mean_SE = summed_SE / valid_T.view(-1, length).sum(1, keepdim=True).clamp(min=1)
    balance_S = routing.num_experts * (share_SE * mean_SE).sum(-1)
    return reduce_record(record, _identity, means=[balance_S.repeat_interleave(length)])


@LOSSES.register(
    LossFacts(
        equation="mean_t (log Σ_e exp h_te)²",
        paper="arXiv:2202.08906, eq. 5",
        uniform="(ln E)² at logits 0",
        collapsed="grows with the logits",
    ),
    name="z",
)
def z(record: LayerRecord) -> LossValue:
    """Router z-loss: keeps logits small by pulling their log-sum-exp, not each logit, to 0."""
    logits_TE = _require_table(record.routing.logits_TE, "z", "logits")
    return reduce_record(record, _identity, means=[logits_TE.logsumexp(-1).square()])


@LOSSES.register(
    LossFacts(
        equation="ln E - H(mean_t p_t),  p = softmax(h)",
        paper="arXiv:2310.10837 (sigma-MoE), arXiv:2206.02770 (LIMoE, global entropy)",
        uniform="0",
        collapsed="ln(E / k)",
    ),
    name="global_entropy",
)
def global_entropy(record: LayerRecord) -> LossValue:
    """Entropy of the mean expert probabilities, subtracted from its maximum ln E; the papers use minus the entropy."""
    logits_TE = _require_table(record.routing.logits_TE, "global_entropy", "logits")
    return reduce_record(record, _entropy_deficit, means=[logits_TE.softmax(-1)])


def _entropy_deficit(mean_E: Tensor) -> Tensor:
    entropy = -(mean_E * mean_E.clamp(min=1e-20).log()).sum()
    return (math.log(len(mean_E)) - entropy).clamp(min=0)  # rounding can make it negative


@LOSSES.register(
    LossFacts(
        equation="mean_t H(p_t),  p = softmax(h)",
        paper="arXiv:2206.02770 (LIMoE, local entropy)",
        uniform="ln E at equal logits",
        collapsed="0 when every choice is certain",
    ),
    name="local_entropy",
)
def local_entropy(record: LayerRecord) -> LossValue:
    """Mean entropy of a token's expert probabilities, in nats: makes choices confident, balances nothing."""
    logits_TE = _require_table(record.routing.logits_TE, "local_entropy", "logits")
    return reduce_record(record, _identity, means=[_entropy_T(logits_TE)])


def _entropy_T(logits_TE: Tensor) -> Tensor:
    log_TE = logits_TE.log_softmax(-1)
    return -(log_TE.exp() * log_TE).sum(-1)


@LOSSES.register(
    LossFacts(
        equation="ln E - I(token; expert) = ln E - H(mean_t p_t) + mean_t H(p_t)",
        paper="arXiv:2306.04640 (ModuleFormer)",
        uniform="ln E at equal logits; 0 when experts are used evenly and every choice is certain",
        collapsed="ln E",
    ),
    name="mutual_information",
)
def mutual_information(record: LayerRecord) -> LossValue:
    """Mutual information of token and expert, subtracted from its maximum: `global_entropy` plus `local_entropy`.

    The paper's loss is minus the information, which differs by the constant ln E.
    """
    logits_TE = _require_table(record.routing.logits_TE, "mutual_information", "logits")

    def formula(mean_E: Tensor, entropy: Tensor) -> Tensor:
        return _entropy_deficit(mean_E) + entropy

    return reduce_record(record, formula, means=[logits_TE.softmax(-1), _entropy_T(logits_TE)])


@LOSSES.register(
    LossFacts(
        equation="Var_e(I_e) / Mean_e(I_e)²,  I_e = Σ_t w_te",
        paper="arXiv:1701.06538, eq. 6-7",
        uniform="0",
        collapsed="E / k - 1",
    ),
    name="importance",
)
def importance(record: LayerRecord) -> LossValue:
    """Squared coefficient of variation of each expert's summed weights (Shazeer et al. 2017)."""
    return reduce_record(record, compute_squared_variation, totals=[record.routing.importance_E])


@LOSSES.register(
    LossFacts(
        equation="E · Σ_e s_e f_e P_e,  s_e = size of expert e / mean size, f and P as in load_balance",
        paper="arXiv:2408.10681 (HMoE, parameter penalty)",
        uniform="1",
        collapsed="E / k times the mean s of the k experts",
    ),
    name="parameter_penalty",
)
def parameter_penalty(record: LayerRecord) -> LossValue:
    """HMoE's parameter penalty: a balance loss that weights the load of an expert by its size.

    For layouts with experts of different sizes, in place of `load_balance`, to which it is equal when all sizes are.
    The size of an expert is its FLOPs per row, which for a network are proportional to its parameters; experts without
    a network have size 0. The paper counts assignments per token and multiplies by the hidden width itself, so its
    value is k times the mean width of this one.
    """
    scores_TE = _require_table(record.routing.scores_TE, "parameter_penalty", "scores")
    size_E = build_constant_like(record.flops_E or (1,) * record.routing.num_experts, scores_TE)
    num_experts = record.routing.num_experts

    def formula(load_E: Tensor, mean_E: Tensor) -> Tensor:
        share_E = load_E / load_E.sum().clamp(min=1)
        return num_experts * torch.dot(size_E / size_E.mean().clamp(min=1) * share_E, mean_E)

    score_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    return reduce_record(record, formula, totals=[record.routing.load_E.to(scores_TE.dtype)], means=[score_TE])


def recount_by_scores(record: LayerRecord, top_k: int) -> LayerRecord:
    """Return the record of routing each token to the `top_k` experts with its highest scores, without padding."""
    scores_TE = _require_table(record.routing.scores_TE, "sequence_balance", "scores")
    expert_TK = rank_top_k(scores_TE, top_k, quantum=SCORE_QUANTUM)
    weight_TK = scores_TE.gather(-1, expert_TK)
    routing = Routing.from_top_k(expert_TK, weight_TK, num_experts=scores_TE.shape[-1], scores_TE=scores_TE)
    if record.valid_T is not None:
        routing = routing.keep(record.valid_T[routing.token_N])
    return replace(record, routing=routing, kept=routing)


def compute_squared_variation(value_E: Tensor) -> Tensor:
    """Return the squared coefficient of variation, Var/Mean² (population variance); 0 when all values are equal."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)


def _identity(mean: Tensor) -> Tensor:
    return mean


def _require_table(value: Tensor | None, loss: str, table: str) -> Tensor:
    if value is None:
        raise UsageError(f"router.losses.{loss}: this router has no {table}, which the loss needs")
    return value
