"""The memory that training a model needs, from the shapes of its parameters: known before anything is allocated."""

import math
from dataclasses import dataclass
from typing import Protocol, cast

from torch import nn

from moebench.experts.layer import MoELayer
from moebench.models.tied_head import TiedHead
from moebench.models.transformer import Transformer
from moebench.routing.linear_map import find_linear_maps
from moebench.tasks.deferred_logits import CHUNK_LOGITS
from moebench.tasks.language import TokenHead

FLOAT_BYTES = 4
"""Parameters, gradients and moments are fp32 in every precision; so is what the backward pass reads."""
OPTIMIZER_COPIES = 4
"""Of each parameter: its value, its gradient and AdamW's two moments, or Muon's one and its direction."""
COPIES_OF_A_VALUE = 1.9
"""Tensors of the size of a matrix product's input or output that are alive at the peak: the value itself, and its
norm, activation, residual sum or gradient. Fitted to measured peaks."""
COPIES_IN_BF16_ON_CPU = 5.5
"""The same under autocast on a CPU, whose products of groups work on fp32 copies. Fitted as well."""


class _MoEBackbone(Protocol):
    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers."""


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What determines the memory of a model, besides the batch and the number of processes."""

    replicated_params: int
    """Parameters that every process has."""
    expert_params: int
    """Parameters of expert banks, which are sharded over `parallel.expert` processes."""
    values_per_token: float
    """Inputs and outputs of all matrix products that one token takes part in, at an even load, as far as they are kept
    at a time."""
    logits_of_heads: tuple[tuple[int, int | None], ...] = ()
    """Vocabulary of each head, and the logits above which they are computed in chunks; None: never."""

    @classmethod
    def of(cls, model: nn.Module, backbone: _MoEBackbone, sequence_length: int = 0) -> "ModelSize":
        """Measure a model, which may be on the meta device.

        `sequence_length`: for modules with values besides those of their own matrices, which count them themselves.
        """
        values = _ValueCount(model, backbone, sequence_length)
        expert_params = sum(parameter.numel() for parameter in model.parameters() if id(parameter) in values.rows)
        heads = [module for module in model.modules() if isinstance(module, TokenHead | TiedHead)]
        return cls(
            replicated_params=sum(parameter.numel() for parameter in model.parameters()) - expert_params,
            expert_params=expert_params,
            values_per_token=values.count_kept(),
            logits_of_heads=tuple((values.count_outputs(head), head.max_logits) for head in heads),
        )

    def training_bytes(self, tokens: int, *, shards: int = 1, passes: int = 1, copies: float) -> int:
        """Return the bytes of one process at the peak of a training step, without the program itself.

        `tokens`: of one micro-batch on the process; `shards`: processes over which experts are sharded; `passes`:
        forward passes of a step; `copies`: of each value that are alive (`COPIES_OF_A_VALUE`).
        """
        params = self.replicated_params + self.expert_params / shards
        values = self.values_per_token * tokens * passes
        for vocabulary, limit in self.logits_of_heads:
            if limit is not None and vocabulary * tokens > limit:
                values -= vocabulary * tokens * passes - min(vocabulary * tokens, CHUNK_LOGITS)
        activations = copies * values
        return math.ceil(FLOAT_BYTES * (OPTIMIZER_COPIES * params + activations))


class _ValueCount:
    """Counts the inputs and outputs of the matrix products of one token."""

    def __init__(self, model: nn.Module, backbone: _MoEBackbone, sequence_length: int) -> None:
        self.model = model
        self.sequence_length = sequence_length
        self.rows: dict[int, float] = {}
        """Rows of a token in each parameter of a bank, by the identity of the parameter."""
        for layer in backbone.moe_layers():
            share = layer.rows_per_token / layer.bank.num_experts
            self.rows |= {id(parameter): share for parameter in layer.bank.parameters()}
        self._tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        _, self._vectors = find_linear_maps(model)

    def count_kept(self) -> float:
        """Return how many are kept at a time: of blocks that are computed again, their inputs and the largest block."""
        kept = self._count_in(self.model)
        for transformer in self.model.modules():
            if isinstance(transformer, Transformer) and transformer.recomputes_blocks:
                of_blocks = [self._count_in(block) for block in transformer.blocks]
                kept += len(of_blocks) * transformer.style.d_model + max(of_blocks) - sum(of_blocks)
        return kept

    def count_outputs(self, head: nn.Module) -> int:
        """Return the size of a head's vocabulary."""
        return head.num_outputs if isinstance(head, TiedHead) else cast(TokenHead, head).out_features

    def _count_in(self, module: nn.Module) -> float:
        counts = [getattr(part, "values_per_token", None) for part in module.modules()]
        values = float(sum(count(self.sequence_length) for count in counts if count is not None))
        for parameter in module.parameters():
            if parameter.dim() >= 2 and id(parameter) not in self._vectors:
                *stack, num_inputs, num_outputs = parameter.shape
                width = num_outputs if id(parameter) in self._tables else num_inputs + num_outputs
                values += self.rows.get(id(parameter), 1.0) * math.prod(stack) * width
        return values
