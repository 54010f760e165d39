"""Auxiliary losses: pure functions of a LayerRecord, raw, under one normalisation for every router.

Balance losses are 1 (products) or 0 (squared variations) at uniform routing for every number of experts per token,
are computed per layer and then averaged over layers: a sum over layers, or a pool of all layers, would make the
same coefficient mean different things in different models. The coefficient is applied once, in training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.registry import Registry
from moebench.routing.values import LayerRecord

Loss = Callable[[LayerRecord], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossFacts:
    """What a loss is and what its value means."""

    equation: str
    paper: str
    uniform: str
    """Value at uniform routing."""
    collapsed: str
    """Value when every token goes to the same k experts."""


LOSSES: Registry[Loss, LossFacts] = Registry("loss", None)


@LOSSES.register(
    LossFacts(
        equation="E · Σ_e f_e P_e,  f_e = share of assignments, P_e = mean score",
        paper="arXiv:2101.03961, eq. 4-6",
        uniform="1",
        collapsed="E / k",
    ),
    name="load_balance",
)
def load_balance(record: LayerRecord) -> Tensor:
    """Switch's load-balance loss: 1 at uniform for every k, E/k when k experts take all.

    f is counted before capacity and carries no gradient. Where papers count f as assignments per token (it then
    sums to k) their coefficient times k is ours. Not bounded below by 1: f and P may disagree.
    """
    scores_TE = _need(record.routing.scores_TE, "load_balance", "scores")
    load_E = record.load_E.to(scores_TE.dtype)
    share_E = load_E / load_E.sum().clamp(min=1)
    score_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp(min=1e-20)
    return record.routing.num_experts * torch.dot(share_E, record.mean(score_TE))


@LOSSES.register(
    LossFacts(
        equation="mean_t (log Σ_e exp h_te)²",
        paper="arXiv:2202.08906, eq. 5",
        uniform="(ln E)² at logits 0",
        collapsed="grows with the logits",
    ),
    name="z",
)
def z(record: LayerRecord) -> Tensor:
    """Router z-loss: keeps logits small; it pulls the log-sum-exp, not each logit, to 0."""
    logits_TE = _need(record.routing.logits_TE, "z", "logits")
    return record.mean(logits_TE.logsumexp(-1).square())


@LOSSES.register(
    LossFacts(
        equation="Var_e(I_e) / Mean_e(I_e)²,  I_e = Σ_t w_te",
        paper="arXiv:1701.06538, eq. 6-7",
        uniform="0",
        collapsed="E / k - 1",
    ),
    name="importance",
)
def importance(record: LayerRecord) -> Tensor:
    """Squared coefficient of variation of the summed weights of each expert (Shazeer et al. 2017)."""
    return squared_variation(record.importance_E)


def squared_variation(value_E: Tensor) -> Tensor:
    """Return Var/Mean² with the population variance; 0 when all are equal (and for an empty batch)."""
    return value_E.var(unbiased=False) / (value_E.mean().square() + 1e-10)


def _need(value: Tensor | None, loss: str, what: str) -> Tensor:
    if value is None:
        raise UsageError(f"router.losses.{loss}: this router makes no {what}, so the loss does not exist for it")
    return value
