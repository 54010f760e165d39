"""Soft routing: experts compute slots, which are weighted means of tokens (arXiv:2308.00951)."""

from collections.abc import Callable

import torch
from torch import Tensor

from moebench.experts.bank import Bank
from moebench.experts.dropout import Dropout
from moebench.routing.mixing import SoftRouting


def soft_mixture(
    bank: Bank,
    x_TD: Tensor,
    routing: SoftRouting,
    dropout: Dropout | None = None,
    while_in_flight: Callable[[], None] | None = None,
) -> Tensor:
    """Return y_TD: tokens to slots, each slot through its expert, slots back to tokens; group by group."""
    num_groups, _, num_slots = routing.dispatch_BLS.shape
    num_experts, width = routing.num_experts, x_TD.shape[-1]
    x_BSD = routing.dispatch_BLS.to(x_TD.dtype).mT @ routing.to_groups(x_TD)
    # The rows of an expert are its slots of all groups.
    x_EBPD = x_BSD.view(num_groups, num_experts, routing.slots_per_expert, width).transpose(0, 1)
    load_E = torch.full((num_experts,), num_groups * routing.slots_per_expert, device=x_TD.device)
    y_EBPD = bank(x_EBPD.flatten(0, 2), load_E, dropout, while_in_flight).view_as(x_EBPD)
    y_BSD = y_EBPD.transpose(0, 1).reshape(num_groups, num_slots, width)
    y_BLD: Tensor = routing.combine_BLS.to(y_BSD.dtype) @ y_BSD
    return routing.to_tokens(y_BLD)


def slot_loop(bank: Bank, x_TD: Tensor, routing: SoftRouting) -> Tensor:
    """Return the same by a loop over groups, experts and slots: slow, obvious, the oracle beside the fast path."""
    groups = []
    for x_LD, dispatch_LS, combine_LS in zip(
        routing.to_groups(x_TD), routing.dispatch_BLS, routing.combine_BLS, strict=True
    ):
        y_LD = x_LD * 0
        for expert in range(routing.num_experts):
            for place in range(routing.slots_per_expert):
                slot = expert * routing.slots_per_expert + place
                mean_D = (dispatch_LS[:, slot, None].to(x_LD.dtype) * x_LD).sum(0)
                y_LD = y_LD + combine_LS[:, slot, None].to(x_LD.dtype) * bank.expert(mean_D, expert)
        groups.append(y_LD)
    return routing.to_tokens(torch.stack(groups)) if groups else x_TD * 0
