"""The backbone: pre-norm transformer blocks whose parts are dense or banks of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.models.attention import Attention, CrossAttention, EncoderOutput, PositionTable
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.ranks import Span
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature, collect
from moebench.routing.layer_name import LayerName
from moebench.routing.values import LayerRecord
from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchContext:
    """Inputs of a forward pass besides the vectors; each MoE layer gets its RouteContext from it."""

    training: bool
    seed: int
    step: int = 0
    token_id_BL: Tensor | None = None
    valid_BL: Tensor | None = None
    document_BL: Tensor | None = None
    """Document of each position, where attention stays inside documents (`Batch.document_BL`)."""
    domain_B: Tensor | None = None
    features: Mapping[type[Feature], Tensor] = field(default_factory=dict)
    """Values of the features that routers require, by token: the first dimension is T."""
    encoder_output: EncoderOutput | None = None
    """What a decoder attends to; None in other models."""
    span: Span | None = None
    """Sequences of the batch that are on this process; None: all."""
    micro_batch: int = 0
    """Index of the micro-batch in the step, or of the batch in the evaluation: each draws its own noise."""
    repeat: int = 0
    """Index of the pass over the batch, where training makes several: each draws its own noise."""

    @property
    def positions(self) -> PositionTable | None:
        """Positions that are not padding, and their documents; None where nothing is padded or masked."""
        if self.document_BL is not None:
            return PositionTable.of_documents(self.document_BL)
        return None if self.valid_BL is None else PositionTable.of_padded(self.valid_BL)

    def route_in(self, layer: MoELayer, x_BLD: Tensor) -> RouteContext:
        """Return the context of an MoE layer for a batch of vectors."""
        return self.route(layer.name, x_BLD.shape[1], x_BLD.device)

    def route(self, layer: LayerName, length: int, device: torch.device) -> RouteContext:
        """Return the context of one layer, with a generator that depends on the seed, the step and the layer."""
        purpose: tuple[str | int, ...] = ("router", self.step) if self.training else ("router in evaluation",)
        purpose = (*purpose, "micro-batch", self.micro_batch) if self.micro_batch else purpose
        purpose = (*purpose, "repeat", self.repeat) if self.repeat else purpose
        domain_T = None if self.domain_B is None else self.domain_B.repeat_interleave(length)
        return RouteContext(
            training=self.training,
            generator=make_generator(self.seed, *purpose, layer.seed_part, device=device),
            sequence_length=length,
            token_id_T=None if self.token_id_BL is None else self.token_id_BL.reshape(-1),
            valid_T=None if self.valid_BL is None else self.valid_BL.reshape(-1),
            domain_T=domain_T,
            features=self.features,
            step=self.step,
            span=None if self.span is None else self.span.to_tokens(length),
        )


class Block(nn.Module):
    """Attention and feed-forward part, each after a norm and added to the residual stream; either can hold experts.

    A decoder that reads an encoder has cross-attention between them.
    """

    def __init__(
        self,
        d_model: int,
        attention: Attention | ProjectionExperts | HeadExperts,
        feed_forward: FeedForward | MoELayer,
        cross_attention: CrossAttention | None = None,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(d_model)
        self.attention = attention
        self.cross_attention_norm = None if cross_attention is None else nn.RMSNorm(d_model)
        self.cross_attention = cross_attention
        self.feed_forward_norm = nn.RMSNorm(d_model)
        self.feed_forward = feed_forward

    def forward(
        self, x_BLD: Tensor, ctx: BatchContext, positions: PositionTable | None = None
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the new residual stream and the records of the block's MoE layers.

        `positions`: positions of the vectors in their sequences, when a dense block gets only some of them.
        """
        positions = positions or ctx.positions
        records = []
        x_normed_BLD = self.attention_norm(x_BLD)
        if isinstance(self.attention, Attention):
            y_BLD = self.attention(x_normed_BLD, positions)
        else:
            y_BLD, record = self.attention(x_normed_BLD, ctx.route_in(self.attention.layer, x_BLD), positions)
            records.append(record)
        x_BLD = x_BLD + y_BLD
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert ctx.encoder_output is not None
            x_BLD = x_BLD + self.cross_attention(self.cross_attention_norm(x_BLD), ctx.encoder_output)
        x_TD = self.feed_forward_norm(x_BLD).flatten(0, 1)
        if isinstance(self.feed_forward, MoELayer):
            y_TD, record = self.feed_forward(x_TD, ctx.route_in(self.feed_forward, x_BLD))
            records.append(record)
        else:
            y_TD = self.feed_forward(x_TD)
        return x_BLD + y_TD.view_as(x_BLD), records

    def flops_per_token(self, length: int) -> int:
        """Return forward FLOPs per token in a sequence of `length`, without cross-attention (`flops_across`)."""
        return self.attention.flops_per_token(length) + self.feed_forward.flops_per_token()

    def flops_across(self, length: int, encoder_length: int) -> int:
        """Return the forward FLOPs of the cross-attention of one sequence."""
        return 0 if self.cross_attention is None else self.cross_attention.flops(length, encoder_length)


class Transformer(nn.Module):
    """Blocks and a final norm: x_BLD -> x_BLD and the records of its MoE layers."""

    def __init__(self, d_model: int, blocks: Sequence[nn.Module], features: Sequence[Feature] = ()) -> None:
        """`blocks`: each maps (x_BLD, ctx) to x_BLD and its records. `features`: those that routers require."""
        super().__init__()
        self.features = tuple(features)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model)

    def forward(self, x_BLD: Tensor, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the normed residual stream and one record per MoE layer, from the bottom."""
        records: list[LayerRecord] = []
        for block in self.blocks:
            x_BLD, block_records = block(x_BLD, ctx)
            records += block_records
            ctx = self._with_layer_features(ctx, block_records)
        return self.norm(x_BLD), records

    def _with_layer_features(self, ctx: BatchContext, records: Sequence[LayerRecord]) -> BatchContext:
        """Return the context of the next block, with what features take from the last MoE layer of this one."""
        values = collect(self.features, lambda feature: feature.from_layer(records[-1])) if records else {}
        return replace(ctx, features={**ctx.features, **values}) if values else ctx

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in the order of the records; none in a dense model."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialise every module from a generator seeded by the run's seed and the module's name.

    Two arms with the same seed start with identical weights in all modules that they share, which makes seeds paired.
    """
    for name, module in model.named_modules():
        init = getattr(module, "init_weights", None)
        if init is not None:
            init(make_generator(seed, "init", name))
