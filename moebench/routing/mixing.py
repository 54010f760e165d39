"""The output of routers that do not select: they mix tokens into slots, or experts into one network."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from typing_extensions import override

from moebench.routing.abstract import AbstractRouting, ExpertPass


@dataclass(frozen=True, kw_only=True, eq=False)
class SoftRouting(AbstractRouting):
    """How much of each token goes into each slot and comes back from it: B groups of L tokens with S slots each.

    A slot is a weighted mean of its group's tokens and belongs to one expert: the first S/E slots of a group to
    expert 0, the next to expert 1, and so on. Nothing is chosen, so nothing can be over capacity or dropped; padding
    goes into no slot and gets nothing back.
    """

    dispatch_BLS: Tensor
    """fp32: over the tokens of a group the weights of a slot sum to 1 (to 0 in a group of padding alone)."""
    combine_BLS: Tensor
    """fp32: what a token gets back of each slot: 1 over the slots, or for each slot 1 over the tokens."""
    num_experts: int
    group_index_T: Tensor | None = None
    """int64: position b · L + l of each token in the groups; positions may stay empty (like padding they have no
    weights). None: group after group, in order."""
    logits_BLS: Tensor | None = None
    """fp32: the logits of both softmaxes."""
    logits_TE: ClassVar[None] = None
    """There is no logit of a token and an expert, so the losses that need one do not exist."""
    scores_TE: ClassVar[None] = None
    """There is no score of a token and an expert either."""
    computes_padding: ClassVar[bool] = True

    @classmethod
    def from_logits(cls, logits_BLS: Tensor, *, num_experts: int, valid_T: Tensor | None = None) -> "SoftRouting":
        """Take the softmax over tokens to dispatch and over slots to combine (arXiv:2308.00951, eq. 1-3)."""
        valid_BL1 = None if valid_T is None else valid_T.view(logits_BLS.shape[0], -1, 1)
        combine_BLS = logits_BLS.softmax(2)
        return cls(
            dispatch_BLS=softmax_over_tokens(logits_BLS, valid_BL1),
            combine_BLS=combine_BLS if valid_BL1 is None else combine_BLS * valid_BL1,
            num_experts=num_experts,
            logits_BLS=logits_BLS,
        )

    @override
    def compute(self, experts: ExpertPass) -> Tensor:
        num_groups, _, num_slots = self.dispatch_BLS.shape
        width = experts.x_TD.shape[-1]
        x_BSD = self.dispatch_BLS.to(experts.x_TD.dtype).mT @ self.to_groups(experts.x_TD)
        # The rows of an expert are its slots of all groups.
        x_EBPD = x_BSD.view(num_groups, self.num_experts, self.slots_per_expert, width).transpose(0, 1)
        y_EBPD = experts.compute_rows(x_EBPD.flatten(0, 2), self.rows_E).view_as(x_EBPD)
        y_BSD = y_EBPD.transpose(0, 1).reshape(num_groups, num_slots, width)
        return self.to_tokens(self.combine_BLS.to(y_BSD.dtype) @ y_BSD)

    @override
    def tabulate_labels(self, label_T: Tensor, num_labels: int) -> Tensor:
        # The summed combine weights: how much of an expert's output the tokens get.
        table_YE = torch.zeros(num_labels, self.num_experts, dtype=torch.float64, device=label_T.device)
        weight_TS = self.to_tokens(self.combine_BLS).double()
        weight_TEP = weight_TS.view(-1, self.num_experts, self.slots_per_expert)  # the shape of no tokens is known too
        return table_YE.index_add(0, label_T, weight_TEP.sum(-1))

    def to_groups(self, value_TX: Tensor) -> Tensor:
        """Return a value of each token at its position in the groups, [B, L, X]; 0 at empty positions."""
        shape = *self.dispatch_BLS.shape[:2], value_TX.shape[-1]
        if self.group_index_T is None:
            return value_TX.view(shape)
        return scatter_to_groups(value_TX, self.group_index_T, shape[0] * shape[1]).view(shape)

    def to_tokens(self, value_BLX: Tensor) -> Tensor:
        """Return the value at each token's position, [T, X]."""
        value_TX = value_BLX.flatten(0, 1)
        return value_TX if self.group_index_T is None else value_TX[self.group_index_T]

    @property
    def num_tokens(self) -> int:
        """T: B · L without empty positions."""
        if self.group_index_T is not None:
            return self.group_index_T.shape[0]
        return self.dispatch_BLS.shape[0] * self.dispatch_BLS.shape[1]

    @property
    def slots_per_expert(self) -> int:
        """Slots of one expert in one group."""
        return self.dispatch_BLS.shape[2] // self.num_experts

    @property
    def load_E(self) -> Tensor:
        """Slots per expert with any token in them, int64: equal by construction."""
        filled_BS = self.dispatch_BLS.detach().sum(1) > 0
        return filled_BS.view(-1, self.num_experts, self.slots_per_expert).sum((0, 2))

    @property
    def rows_E(self) -> Tensor:
        """Rows that each expert computes, int64: its slots of all groups, filled or not."""
        num_rows = self.dispatch_BLS.shape[0] * self.slots_per_expert
        return torch.full((self.num_experts,), num_rows, device=self.dispatch_BLS.device)

    @property
    def importance_E(self) -> Tensor:
        """Summed combine weights per expert."""
        return self.combine_BLS.sum((0, 1)).view(self.num_experts, -1).sum(-1)

    @property
    def experts_per_token_T(self) -> Tensor:
        """Experts that a token gets something back from, int64: all of them, or none for padding."""
        combine_TS = self.to_tokens(self.combine_BLS.detach())
        weight_TEP = combine_TS.reshape(-1, self.num_experts, self.slots_per_expert)
        return (weight_TEP.sum(-1) > 0).sum(-1)


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeRouting(AbstractRouting):
    """Which network each segment of tokens goes through: the experts' parameters, summed with these weights.

    Each sequence is cut into segments of `segment_length` tokens, the last one of what is left; G segments of all
    sequences, in order. The network of segment g has the parameters Σ_e w_ge θ_e. Nothing is chosen, so nothing can be
    over capacity or dropped; padding gets nothing back.
    """

    weight_GE: Tensor
    """fp32: the share of each expert's parameters in a segment's network; 1 over the experts."""
    num_tokens: int
    sequence_length: int
    segment_length: int
    logits_GE: Tensor | None = None
    """fp32: the weights are their softmax."""
    valid_T: Tensor | None = None
    """bool, False at padding; None when nothing is padded."""
    scores_TE: ClassVar[None] = None
    """Every expert has a share in every token's network, so loads are even and there is nothing to balance by them."""
    computes_padding: ClassVar[bool] = True

    @override
    def compute(self, experts: ExpertPass) -> Tensor:
        return self.to_tokens(experts.compute_merged(self.to_segments(experts.x_TD), self.weight_GE))

    @override
    def tabulate_labels(self, label_T: Tensor, num_labels: int) -> Tensor:
        # The summed shares of the experts' parameters in the tokens' networks.
        table_YE = torch.zeros(num_labels, self.num_experts, dtype=torch.float64, device=label_T.device)
        return table_YE.index_add(0, label_T, self.weight_TE.double())

    @property
    def num_experts(self) -> int:
        """E."""
        return self.weight_GE.shape[1]

    @property
    def logits_TE(self) -> Tensor | None:
        """Each token's logits: those of its segment."""
        return None if self.logits_GE is None else self._repeat_for_tokens(self.logits_GE)

    @property
    def weight_TE(self) -> Tensor:
        """Each token's shares: those of its segment, 0 for padding."""
        weight_TE = self._repeat_for_tokens(self.weight_GE)
        return weight_TE if self.valid_T is None else weight_TE * self.valid_T.unsqueeze(-1)

    @property
    def load_E(self) -> Tensor:
        """Tokens in whose network an expert has a share, int64: all but padding, unless the router leaves some out."""
        return (self.weight_TE.detach() > 0).sum(0)

    @property
    def rows_E(self) -> Tensor:
        """Rows of work for each expert, fp64: its part of the positions of all segments, and one for each merge.

        Merging E experts costs as much as E rows through one of them: 2 FLOPs per weight.
        """
        num_segments = self.weight_GE.shape[0]
        num_rows = num_segments * self.segment_length / self.num_experts + num_segments
        return self.weight_GE.new_full((self.num_experts,), num_rows, dtype=torch.float64)

    @property
    def importance_E(self) -> Tensor:
        """Summed shares of the tokens' networks."""
        return self.weight_TE.sum(0)

    @property
    def experts_per_token_T(self) -> Tensor:
        """Experts with a share in a token's network, int64; none for padding."""
        return (self.weight_TE.detach() > 0).sum(-1)

    def to_segments(self, value_TX: Tensor) -> Tensor:
        """Return a value of each token by segments, [G, segment_length, X]; 0 where a last segment is shorter."""
        return split_into_segments(value_TX, self.sequence_length, self.segment_length)

    def to_tokens(self, value_GSX: Tensor) -> Tensor:
        """Return the value at each token's position in its segment, [T, X]; 0 for padding."""
        length = count_segments(self.sequence_length, self.segment_length) * self.segment_length
        value_BLX = value_GSX.reshape(-1, length, value_GSX.shape[-1])[:, : self.sequence_length]
        value_TX = value_BLX.reshape(self.num_tokens, value_GSX.shape[-1])
        return value_TX if self.valid_T is None else value_TX * self.valid_T.unsqueeze(-1)

    def _repeat_for_tokens(self, value_GE: Tensor) -> Tensor:
        num_segments = count_segments(self.sequence_length, self.segment_length)
        value_BLE = value_GE.repeat_interleave(self.segment_length, dim=0).view(
            -1, num_segments * self.segment_length, self.num_experts
        )
        return value_BLE[:, : self.sequence_length].reshape(self.num_tokens, self.num_experts)


def softmax_over_tokens(logits_BLS: Tensor, valid_BL1: Tensor | None) -> Tensor:
    """Return the softmax over the tokens of each group without padding, which gets 0: all of a group may be padding."""
    if valid_BL1 is None:
        return logits_BLS.softmax(1)
    # The lowest number and not -inf, which would give NaN in a group of padding alone.
    return logits_BLS.masked_fill(~valid_BL1, torch.finfo(logits_BLS.dtype).min).softmax(1) * valid_BL1


def scatter_to_groups(value_TX: Tensor, group_index_T: Tensor, num_positions: int) -> Tensor:
    """Return the values at their tokens' positions, [positions, X], and 0 at empty positions."""
    return value_TX.new_zeros(num_positions, value_TX.shape[-1]).index_copy(0, group_index_T, value_TX)


def count_segments(sequence_length: int, segment_length: int) -> int:
    """Return how many segments a sequence has, the last one perhaps shorter."""
    return -(-sequence_length // segment_length)


def split_into_segments(value_TX: Tensor, sequence_length: int, segment_length: int) -> Tensor:
    """Return a value of each token by segments of its sequence, [G, segment_length, X], filled up with 0."""
    value_BLX = value_TX.view(-1, sequence_length, value_TX.shape[-1])
    missing = -sequence_length % segment_length
    if missing:
        value_BLX = functional.pad(value_BLX, (0, 0, 0, missing))
    return value_BLX.reshape(-1, segment_length, value_TX.shape[-1])
