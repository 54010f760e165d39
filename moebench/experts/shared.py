"""Shared experts: a dense network that every token uses beside its routed experts."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moebench.experts.activation import Dropout
from moebench.experts.feed_forward import FeedForward
from moebench.routing.gate import Gate


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedExperts:
    """The shared network in one forward pass: computed once, on first use.

    DeepSeekMoE's shared experts (arXiv:2401.06066, section 3.2) are one network of their summed width, added to the
    output of the routed experts. With a mixing gate, the two are weighted by c = softmax(x W_c + b) instead (PR-MoE,
    arXiv:2201.05596, section 4.1; the learned c and its bias are those of its implementation, DeepSpeed).
    """

    network: FeedForward
    mixing_gate: Gate | None
    x_TD: Tensor
    dropout: Dropout | None

    @cached_property
    def output_TD(self) -> Tensor:
        """Output of the shared network."""
        output_TD: Tensor = self.network(self.x_TD, self.dropout)
        return output_TD

    def compute(self) -> None:
        """Compute the output now, for example while rows are in flight between processes."""
        _ = self.output_TD

    def add_to(self, y_TD: Tensor) -> Tensor:
        """Return the output of the routed experts, `y_TD`, together with that of the shared network."""
        if self.mixing_gate is None:
            return y_TD + self.output_TD
        output_TD = self.output_TD
        with torch.autocast(y_TD.device.type, enabled=False):
            share_T2: Tensor = self.mixing_gate(self.x_TD.float()).softmax(-1)
        return share_T2[:, :1].to(y_TD.dtype) * y_TD + share_T2[:, 1:].to(output_TD.dtype) * output_TD
