"""Mixtures of the predictions of whole models: fixed weights, and the posterior given the text so far."""

import torch
from torch import Tensor


def mix_evenly(log_p_MBL: Tensor) -> Tensor:
    """Return nats_BL = -ln (1/M) Σ_m p_m: the code length of each target under the mean of M models' probabilities."""
    even_M = log_p_MBL.new_full((len(log_p_MBL),), len(log_p_MBL)).log().neg()
    return -(log_p_MBL + even_M[:, None, None]).logsumexp(0)


def mix_by_posterior(log_p_MBL: Tensor) -> tuple[Tensor, Tensor]:
    """Return nats_BL = -ln Σ_m π_m(t) p_m(x_t), and π_MBL.

    `log_p_MBL`: log-probability of each target under each of M models, in the order of the text. The weights are the
    posterior over models given the earlier targets of the sequence, from an even prior (DEMix, arXiv:2108.05036,
    section 5; branch-train-merge, arXiv:2208.03306, section 2):

        π_m(t) = Π_{s<t} p_m(x_s) / Σ_n Π_{s<t} p_n(x_s)

    By the chain rule the code length of a sequence is that of the mixture of its probabilities as a whole.
    """
    before_MBL = log_p_MBL.cumsum(-1) - log_p_MBL
    log_posterior_MBL = before_MBL.log_softmax(0)
    return -(log_posterior_MBL + log_p_MBL).logsumexp(0), log_posterior_MBL.exp()


def select_model(log_p_MBL: Tensor, model_B: Tensor) -> Tensor:
    """Return nats_BL of one model for each sequence."""
    return -log_p_MBL[model_B, torch.arange(log_p_MBL.shape[1], device=log_p_MBL.device)]
