"""Layers whose experts are one behind another, and the states of a token after each of them."""

import torch
from support.cases import Case
from torch import Tensor

from moebench.experts.bank_pass import divide_by_rms
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.layer import MoELayer


def layer_of(name: str, num_experts: int = 4, *, bias: float | None = None, **options) -> MoELayer:
    """Build a layer with drawn weights; with `bias` every step has the same logit, that bias."""
    layer = Case(name, num_experts, options).layer()
    if bias is not None:
        with torch.no_grad():
            layer.router.gate.weight_ED.zero_()
            layer.router.bias.fill_(bias)
    return layer


def states(bank: ExpertBank, x_TD: Tensor) -> list[Tensor]:
    """Return h_1 ... h_E of tokens that take all steps."""
    states = [x_TD]
    for step in range(bank.num_experts):
        read_TD = x_TD if step == 0 else divide_by_rms(states[-1])
        states.append(states[-1] + bank.expert(read_TD, step))
    return states[1:]
