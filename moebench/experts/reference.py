"""Slow reference implementations of every kind of routing, for tests and benchmarks to compare the layer with."""

import torch
from torch import Tensor

from moebench.experts.bank import Bank
from moebench.experts.bank_pass import divide_by_rms
from moebench.routing.mixing import SoftRouting
from moebench.routing.values import ChainRouting, Routing


def double_loop(bank: Bank, x_TD: Tensor, routing: Routing) -> Tensor:
    """Return Σ_e w_te E_e(x_t) by a loop over assignments."""
    routing = routing.compact()
    tokens = list(x_TD * 0)
    pairs = zip(routing.token_N.tolist(), routing.expert_N.tolist(), routing.weight_N, strict=True)
    for token, expert, weight in pairs:
        tokens[token] = tokens[token] + weight.to(x_TD.dtype) * bank.expert(x_TD[token], expert)
    return torch.stack(tokens) if tokens else x_TD * 0


def slot_loop(bank: Bank, x_TD: Tensor, routing: SoftRouting) -> Tensor:
    """Return the output of soft routing by a loop over groups, experts and slots."""
    groups = []
    for x_LD, dispatch_LS, combine_LS in zip(
        routing.to_groups(x_TD), routing.dispatch_BLS, routing.combine_BLS, strict=True
    ):
        y_LD = x_LD * 0
        for slot in range(dispatch_LS.shape[1]):
            mean_D = (dispatch_LS[:, slot, None].to(x_LD.dtype) * x_LD).sum(0)
            y_D = bank.expert(mean_D, slot // routing.slots_per_expert)
            y_LD = y_LD + combine_LS[:, slot, None].to(x_LD.dtype) * y_D
        groups.append(y_LD)
    return routing.to_tokens(torch.stack(groups)) if groups else x_TD * 0


def chain_loop(bank: Bank, x_TD: Tensor, routing: ChainRouting) -> Tensor:
    """Return the output of a chain of experts by a loop over tokens and their steps."""
    compact = routing.compact()
    tokens = list(x_TD * 0)
    state = list(x_TD)
    pairs = zip(compact.token_N.tolist(), compact.expert_N.tolist(), compact.weight_N, strict=True)
    for token, step, weight in pairs:  # a token's steps are listed in their order
        read_D = state[token] if step == 0 else divide_by_rms(state[token])
        state[token] = state[token] + bank.expert(read_D, step)
        tokens[token] = tokens[token] + weight.to(x_TD.dtype) * (state[token] - x_TD[token])
    return torch.stack(tokens) if tokens else x_TD * 0
