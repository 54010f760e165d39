"""Experts one behind another: each computes the tokens that are still on their way, and the router is asked between."""

import torch
from torch import Tensor
from torch.nn import functional

from moebench.experts.bank import Bank
from moebench.experts.dropout import Dropout
from moebench.routing.values import ChainRouting, Routing


class Chain:
    """The states of a forward pass's tokens on their way through a bank: h_0 = x, h_n = h_{n-1} + E_n(norm h_{n-1}).

    From the second step on an expert reads the state at unit scale, as the blocks of a pre-norm transformer do:
    added up unnormalised, gated experts make a long chain explode. The first reads x, which has the norm outside.
    """

    def __init__(self, bank: Bank, x_TD: Tensor, dropout: Dropout | None) -> None:
        self.bank = bank
        self.dropout = dropout
        self.state_TD = self.read_TD = x_TD
        self.added: list[Tensor] = []
        device = x_TD.device.type
        self.precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None

    def advance(self, step: int, running_T: Tensor) -> Tensor:
        """Let one expert compute the running tokens; return the state of all as the next one reads it, fp32."""
        num_tokens, device = running_T.shape[0], running_T.device
        expert_T1 = torch.full((num_tokens, 1), step, device=device)
        routing = Routing.from_top_k(expert_T1, torch.ones(num_tokens, 1, device=device), num_experts=self._length)
        # The router is asked in fp32, the experts compute in the precision around the layer.
        with torch.autocast(device.type, dtype=self.precision, enabled=self.precision is not None):
            added_TD = self.bank.mixture(self.read_TD, routing.keep(running_T), self.dropout)
        self.added.append(added_TD)
        self.state_TD = self.state_TD + added_TD
        self.read_TD = unit_scale(self.state_TD)
        return self.read_TD.float()

    @property
    def _length(self) -> int:
        return self.bank.num_experts

    def output(self, routing: ChainRouting) -> Tensor:
        """Return y_TD = Σ_n w_n (h_n - x): what step n added counts by the weights of the steps from n on."""
        weight_TE = routing.weight_N.view(-1, routing.num_experts)
        counts_TE = weight_TE.flip(1).cumsum(1).flip(1)
        y_TD = torch.zeros_like(self.added[0])
        for count_T, added_TD in zip(counts_TE.unbind(1), self.added, strict=True):
            y_TD = y_TD + count_T.unsqueeze(1).to(added_TD.dtype) * added_TD
        return y_TD


def unit_scale(x_RD: Tensor) -> Tensor:
    """Return the vectors over their root mean square."""
    return functional.rms_norm(x_RD, x_RD.shape[-1:])


def chain_loop(bank: Bank, x_TD: Tensor, routing: ChainRouting) -> Tensor:
    """Return the same by a loop over tokens and their steps: slow, obvious, the oracle beside the fast path."""
    compact = routing.compact()
    tokens = list(x_TD * 0)
    state = list(x_TD)
    pairs = zip(compact.token_N.tolist(), compact.expert_N.tolist(), compact.weight_N, strict=True)
    for token, step, weight in pairs:  # a token's steps are listed in their order
        read_D = state[token] if step == 0 else unit_scale(state[token])
        state[token] = state[token] + bank.expert(read_D, step)
        tokens[token] = tokens[token] + weight.to(x_TD.dtype) * (state[token] - x_TD[token])
    return torch.stack(tokens) if tokens else x_TD * 0
