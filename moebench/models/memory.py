"""The memory that training a model needs, from the shapes of its parameters: known before anything is allocated."""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from moebench.experts.layer import MoELayer
from moebench.routing.linear_map import find_linear_maps

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
    """Inputs and outputs of all matrix products that one token takes part in, at an even load."""

    @classmethod
    def of(cls, model: nn.Module, backbone: _MoEBackbone, sequence_length: int = 0) -> "ModelSize":
        """Measure a model, which may be on the meta device.

        `sequence_length`: for modules with values besides those of their own matrices, which count them themselves.
        """
        rows: dict[int, float] = {}
        for layer in backbone.moe_layers():
            share = layer.rows_per_token / layer.bank.num_experts
            rows |= {id(parameter): share for parameter in layer.bank.parameters()}
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        parameters = list(model.parameters())
        expert_params = sum(parameter.numel() for parameter in parameters if id(parameter) in rows)
        counts = [getattr(module, "values_per_token", None) for module in model.modules()]
        values = float(sum(count(sequence_length) for count in counts if count is not None))
        _, vectors = find_linear_maps(model)
        for parameter in parameters:
            if parameter.dim() >= 2 and id(parameter) not in vectors:
                *stack, num_inputs, num_outputs = parameter.shape
                width = num_outputs if id(parameter) in tables else num_inputs + num_outputs
                values += rows.get(id(parameter), 1.0) * math.prod(stack) * width
        return cls(
            replicated_params=sum(parameter.numel() for parameter in parameters) - expert_params,
            expert_params=expert_params,
            values_per_token=values,
        )

    def training_bytes(self, tokens: int, *, shards: int = 1, passes: int = 1, copies: float) -> int:
        """Return the bytes of one process at the peak of a training step, without the program itself.

        `tokens`: of one micro-batch on the process; `shards`: processes over which experts are sharded; `passes`:
        forward passes of a step; `copies`: of each value that are alive (`COPIES_OF_A_VALUE`).
        """
        params = self.replicated_params + self.expert_params / shards
        activations = copies * self.values_per_token * tokens * passes
        return math.ceil(FLOAT_BYTES * (OPTIMIZER_COPIES * params + activations))
