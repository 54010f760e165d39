"""Experts that are whole models: a token stays in its expert from the first block to the last."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from moebench.experts.bank import Bank
from moebench.experts.layer import MoELayer
from moebench.models.positions import PositionTable
from moebench.models.transformer import BatchContext, Block
from moebench.routing.values import LayerRecord, Routing


class StackBank(Bank):
    """E stacks of dense blocks. A token attends only to tokens of its sequence that are in the same stack."""

    is_replicated = True

    def __init__(self, stacks: Sequence[Sequence[Block]]) -> None:
        super().__init__()
        self.num_experts = len(stacks)
        self.stacks = nn.ModuleList(nn.ModuleList(stack) for stack in stacks)

    def compute_mixture_in_sequences(self, x_TD: Tensor, routing: Routing, length: int, ctx: BatchContext) -> Tensor:
        """Return y_TD = Σ_e w_te (stack_e(x)_t - x_t): what its stacks add to each token of sequences of `length`."""
        routing = routing.compact()
        y_TD = torch.zeros_like(x_TD)
        for index in range(self.num_experts):
            # Each stack gets its own batch shape, so the host needs its number of tokens: one synchronization.
            assignment_R = (routing.expert_N == index).nonzero().squeeze(-1)
            assignment_R = assignment_R[routing.token_N[assignment_R].argsort()]
            token_R = routing.token_N[assignment_R]
            added_RD = self.expert_in_sequences(x_TD, token_R, index, length, ctx)
            weight_R1 = routing.weight_N[assignment_R].unsqueeze(-1).to(added_RD.dtype)
            y_TD = y_TD.index_add(0, token_R, (weight_R1 * added_RD).to(y_TD.dtype))
        return y_TD

    def expert_in_sequences(self, x_TD: Tensor, token_R: Tensor, index: int, length: int, ctx: BatchContext) -> Tensor:
        """Return what one stack adds to the tokens `token_R` (ascending), which are all of its tokens."""
        packed = PackedTokens.of(token_R, x_TD.shape[0], length)
        start_BCD = x_TD.new_zeros(*packed.positions.valid_BL.shape, x_TD.shape[-1])
        start_BCD = start_BCD.index_put((packed.sequence_R, packed.column_R), x_TD[token_R])
        x_BCD = start_BCD
        stack = self.stacks[index]
        assert isinstance(stack, nn.ModuleList)
        for block in stack:
            x_BCD, _ = block(x_BCD, ctx, packed.positions)
        added_RD: Tensor = (x_BCD - start_BCD)[packed.sequence_R, packed.column_R]
        return added_RD

    @override
    def flops_per_row_E(self) -> tuple[int, ...]:
        return tuple(
            sum(block.flops_per_token(0) for block in stack.children() if isinstance(block, Block))
            for stack in self.stacks
        )

    @override
    def flops_per_token(self, rows_per_token: float, length: int) -> int:
        # Sequences spread evenly: each stack has its share of every sequence.
        share = int(length * rows_per_token) // self.num_experts
        attention = int(rows_per_token * self._score_flops(share))
        return super().flops_per_token(rows_per_token, length) + attention

    @override
    def executed_flops(self, record: LayerRecord) -> Tensor:
        # A stack runs on a rectangle as long as the longest of its sequences: empty positions are executed too.
        assert isinstance(record.kept, Routing)
        kept, length = record.kept.compact(), record.sequence_length or record.kept.num_tokens
        num_sequences = kept.num_tokens // length
        flops = kept.weight_N.new_zeros((), dtype=torch.float64)
        for index, weight_flops in enumerate(self.flops_per_row_E()):
            sequence_R = kept.token_N[kept.expert_N == index] // length
            longest = max([1, *sequence_R.bincount(minlength=num_sequences).tolist()])
            flops = flops + num_sequences * longest * (weight_flops + self._score_flops(longest))
        return flops

    def _score_flops(self, length: int) -> int:
        """Return the forward FLOPs of attention for one token in all blocks of one stack."""
        blocks = [block for block in self.stacks[0].children() if isinstance(block, Block)]
        return sum(block.flops_per_token(length) - block.flops_per_token(0) for block in blocks)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedTokens:
    """The tokens of one stack, sequence by sequence, without gaps: B sequences of up to C tokens."""

    sequence_R: Tensor
    column_R: Tensor
    """int64: index of each token among those of its sequence."""
    positions: PositionTable

    @classmethod
    def of(cls, token_R: Tensor, num_tokens: int, length: int) -> "PackedTokens":
        """Pack ascending tokens; a stack without tokens gets an empty column, so that its gradient is 0, not None."""
        sequence_R, device = token_R // length, token_R.device
        count_B = torch.zeros(num_tokens // length, dtype=torch.int64, device=device)
        count_B = count_B.index_add(0, sequence_R, torch.ones_like(sequence_R))
        column_R = torch.arange(token_R.numel(), device=device) - (count_B.cumsum(0) - count_B)[sequence_R]
        longest = max([1, *count_B.tolist()])  # a process may have no sequence
        position_BC = torch.zeros(len(count_B), longest, dtype=torch.int64, device=device)
        position_BC = position_BC.index_put((sequence_R, column_R), token_R % length)
        # Attention needs at least one position to attend to.
        valid_BC = torch.arange(longest, device=device) < count_B.clamp(min=1)[:, None]
        positions = PositionTable(position_BL=position_BC, valid_BL=valid_BC, length=length)
        return cls(sequence_R=sequence_R, column_R=column_R, positions=positions)


class WholeModels(nn.Module):
    """Whole models as the experts of one router at the bottom."""

    def __init__(self, layer: MoELayer, d_model: int, num_layers: int) -> None:
        super().__init__()
        self.layer = layer
        self.d_model = d_model
        self.num_layers = num_layers

    @property
    def bank(self) -> StackBank:
        """The stacks."""
        assert isinstance(self.layer.bank, StackBank)
        return self.layer.bank

    def forward(self, x_BLD: Tensor, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the residual stream after the last block, and the one record."""
        length, x_TD = x_BLD.shape[1], x_BLD.flatten(0, 1)
        record = self.layer.route(x_TD, ctx.route_in(self.layer, x_BLD))
        assert isinstance(record.kept, Routing)  # soft routers are refused where the plan is made
        y_TD = self.bank.compute_mixture_in_sequences(x_TD, record.kept, length, ctx)
        return x_BLD + y_TD.view_as(x_BLD), [record]

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token in a sequence of `length`."""
        return self.layer.flops_per_token(length)
