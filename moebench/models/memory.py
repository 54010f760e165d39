"""The memory that training a model needs, from the shapes of its parameters: known before anything is allocated."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, cast

from torch import nn

from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.tied_head import TiedHead
from moebench.models.transformer import Transformer
from moebench.routing.linear_map import find_linear_maps
from moebench.tasks.deferred_logits import CHUNK_LOGITS
from moebench.tasks.language import TokenHead

FLOAT_BYTES = 4
"""Parameters, gradients and moments are fp32 in every precision; so is what the backward pass reads."""
PARAMETER_COPIES = 4
"""Copies of each parameter: value, gradient and AdamW's two moments, or Muon's one and its direction."""
COPIES_IN_ADAMW = 4.6
"""Copies during AdamW's update, with its temporary tensors. Fitted to measured peaks, like the numbers below."""
COPIES_OF_A_VALUE = 1.9
"""Tensors of the size of a matrix product's input or output that are alive at the end of a forward pass: the value
itself, and its norm, activation or residual sum."""
COPIES_IN_BF16_ON_CPU = 1.4
"""Copies under autocast on a CPU, with the weights in bf16."""
RECOMPUTED_WEIGHT_COPIES = 0.5
"""Copies in bf16 of each parameter of a network, kept from the forward pass until its block is computed again. Where
blocks are not computed again, the numbers above include them: the backward pass reads them."""
SAVED_COPIES = 3
"""Copies of each parameter in a checkpoint that is written while training continues: the value and two moments."""
SHARE_IN_UPDATE = 0.5
"""Fraction of the values of a forward pass that are still allocated during the update."""


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
    network_params: int = 0
    """Parameters of dense networks, some of the replicated ones."""
    logits_of_heads: tuple[tuple[int, int | None], ...] = ()
    """Vocabulary of each head, and the logits above which they are computed in chunks; None: never."""

    @classmethod
    def of(
        cls, model: nn.Module, backbone: _MoEBackbone, length: int = 0, decoder_length: int | None = None
    ) -> "ModelSize":
        """Measure a model, which may be on the meta device.

        `length`, `decoder_length`: tokens of a sequence, for modules with values besides those of their own matrices,
        which count them themselves, and for an encoder-decoder, each half of which sees its own tokens.
        """
        values = _ValueCount(model, backbone, length, _share_tokens(model, backbone, length, decoder_length))
        expert_params = sum(parameter.numel() for parameter in model.parameters() if id(parameter) in values.rows)
        networks = (part for part in model.modules() if isinstance(part, FeedForward))
        dense = {id(parameter): parameter.numel() for network in networks for parameter in network.parameters()}
        heads = [module for module in model.modules() if isinstance(module, TokenHead | TiedHead)]
        return cls(
            replicated_params=sum(parameter.numel() for parameter in model.parameters()) - expert_params,
            expert_params=expert_params,
            values_per_token=values.count_kept(),
            network_params=sum(size for key, size in dense.items() if key not in values.rows),
            logits_of_heads=tuple((values.count_outputs(head), head.max_logits) for head in heads),
        )

    def training_bytes(self, tokens: int, step: "StepMemory") -> int:
        """Return the bytes of one process at the peak of training, without the program itself.

        The peak is the end of a forward pass or the update of the parameters. `tokens`: of one micro-batch on the
        process.
        """
        params = self.replicated_params + self.expert_params / step.shards
        values = self.values_per_token * tokens * step.passes
        for vocabulary, limit in self.logits_of_heads:
            if limit is not None and vocabulary * tokens > limit:
                values -= vocabulary * tokens * step.passes - min(vocabulary * tokens, CHUNK_LOGITS)
        num_copies = PARAMETER_COPIES if step.keeps_gradients else PARAMETER_COPIES - 1
        trained = step.trained_share * params
        forward = params + (num_copies - 1) * trained + step.copies * values
        forward += step.weight_copies * (self.network_params + self.expert_params / step.shards)
        temporaries = PARAMETER_COPIES * min(trained, step.batched_update)
        update = params + (COPIES_IN_ADAMW - 1) * trained
        if step.batched_update:
            update = params + (PARAMETER_COPIES - 1) * trained + temporaries
        update += SHARE_IN_UPDATE * step.copies / COPIES_OF_A_VALUE * values
        if step.keeps_gradients:
            update = max(update, params + (COPIES_IN_ADAMW - 1) * trained + step.copies * values)
        return math.ceil(FLOAT_BYTES * (max(forward, update) + step.saved_copies * params))


class _ValueCount:
    """Counts the inputs and outputs of the matrix products of one token."""

    def __init__(
        self, model: nn.Module, backbone: _MoEBackbone, sequence_length: int, token_shares: Mapping[int, float]
    ) -> None:
        """`token_shares`: as `_share_tokens` returns them."""
        self.model = model
        self.sequence_length = sequence_length
        self.token_shares = token_shares
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
                inputs = self.token_shares.get(id(transformer), 1.0) * len(of_blocks) * transformer.style.d_model
                kept += inputs + max(of_blocks) - sum(of_blocks)
        return kept

    def count_outputs(self, head: nn.Module) -> int:
        """Return the size of a head's vocabulary."""
        return head.num_outputs if isinstance(head, TiedHead) else cast(TokenHead, head).out_features

    def _count_in(self, module: nn.Module) -> float:
        values = 0.0
        for part in module.modules():
            count = getattr(part, "values_per_token", None)
            values += self.token_shares.get(id(part), 1.0) * count(self.sequence_length) if count is not None else 0.0
        for parameter in module.parameters():
            if parameter.dim() >= 2 and id(parameter) not in self._vectors:
                *stack, num_inputs, num_outputs = parameter.shape
                width = num_outputs if id(parameter) in self._tables else num_inputs + num_outputs
                rows = self.token_shares.get(id(parameter), 1.0) * self.rows.get(id(parameter), 1.0)
                values += rows * math.prod(stack) * width
        return values


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """What determines the memory of a step, besides the model."""

    shards: int = 1
    """Processes over which experts are sharded."""
    passes: int = 1
    """Forward passes of a step."""
    copies: float = COPIES_OF_A_VALUE
    """Copies of each value that are alive at the end of a forward pass."""
    keeps_gradients: bool = False
    """Whether gradients are in memory during a forward pass: those of earlier micro-batches."""
    trained_share: float = 1.0
    """Share of the parameters that have gradients and moments."""
    batched_update: int = 0
    """Elements of the matrices that Muon updates at a time, 0 for AdamW."""
    weight_copies: float = 0.0
    """Copies of each parameter of a network in the precision of matrix products, besides those in `copies`."""
    saved_copies: int = 0
    """Copies of each parameter that wait in memory until they are in a checkpoint."""


def _share_tokens(
    model: nn.Module, backbone: _MoEBackbone, length: int, decoder_length: int | None
) -> dict[int, float]:
    """Return the share of a sequence's tokens that pass a module or parameter, by its id, where not all do."""
    if not isinstance(backbone, EncoderDecoder) or not decoder_length:
        return {}
    decoded = decoder_length / (length + decoder_length)
    halves: list[tuple[nn.Module, float]] = [(backbone.encoder, 1 - decoded), (backbone.decoder, decoded)]
    halves += [(head, decoded) for name, head in model.named_children() if name == "head"]
    return {id(part): share for half, share in halves for part in (*half.modules(), *half.parameters())}
