"""The backbone: pre-norm transformer blocks whose parts are dense or banks of experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.model_config import ModelConfig
from moebench.models.attention import Attention, CrossAttention, EncoderOutput
from moebench.models.dropout import SequenceDropout
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.models.norms import DEFAULT_NORM, NormStyle
from moebench.models.positions import PositionTable
from moebench.ranks import Span
from moebench.routing.context import RouteContext
from moebench.routing.features.feature import Feature, collect
from moebench.routing.layer_name import LayerName
from moebench.routing.values import LayerRecord
from moebench.seeds import DeferredGenerator, make_generator


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
        purpose = self._name_pass(purpose)
        domain_T = None if self.domain_B is None else self.domain_B.repeat_interleave(length)
        return RouteContext(
            training=self.training,
            generator=DeferredGenerator((self.seed, *purpose, layer.seed_part), device),
            sequence_length=length,
            token_id_T=None if self.token_id_BL is None else self.token_id_BL.reshape(-1),
            valid_T=None if self.valid_BL is None else self.valid_BL.reshape(-1),
            domain_T=domain_T,
            features=self.features,
            step=self.step,
            span=None if self.span is None else self.span.to_tokens(length),
        )

    def dropout(self, rate: float, name: str) -> SequenceDropout | None:
        """Return the dropout at one point of the model, such as "3.attention"; None where nothing is dropped."""
        if rate == 0 or not self.training:
            return None
        purpose = self._name_pass((self.seed, "dropout", self.step))
        return SequenceDropout(rate=rate, purpose=(*purpose, name), span=self.span)

    def _name_pass(self, purpose: tuple[str | int, ...]) -> tuple[str | int, ...]:
        """Return the purpose of draws, extended by the micro-batch and the pass over it where there are several."""
        purpose = (*purpose, "micro-batch", self.micro_batch) if self.micro_batch else purpose
        return (*purpose, "repeat", self.repeat) if self.repeat else purpose


@dataclass(frozen=True, kw_only=True)
class StreamStyle:
    """Norms, scaling and dropout of the residual stream of a model."""

    d_model: int
    norm: NormStyle = DEFAULT_NORM
    residual_scale: float = 1.0
    """Factor on what each part of a block adds."""
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0

    @classmethod
    def of(cls, model: ModelConfig) -> "StreamStyle":
        """Return the residual stream of a configuration."""
        return cls(
            d_model=model.d_model,
            norm=NormStyle.of(model),
            residual_scale=model.residual_scale,
            attention_dropout=model.attention_dropout,
            residual_dropout=model.residual_dropout,
            embedding_dropout=model.embedding_dropout,
        )

    def build_norm(self) -> nn.Module:
        """Build a norm of the residual stream."""
        return self.norm.build(self.d_model)


class Block(nn.Module):
    """Attention and feed-forward part, each after a norm and added to the residual stream; either can hold experts.

    A decoder that reads an encoder has cross-attention between them.
    """

    def __init__(
        self,
        style: StreamStyle,
        dropout_name: str,
        attention: Attention | ProjectionExperts | HeadExperts,
        feed_forward: FeedForward | MoELayer,
        cross_attention: CrossAttention | None = None,
    ) -> None:
        """`dropout_name`: name of the block among all blocks of the model, from which its dropout draws."""
        super().__init__()
        self.style = style
        self.dropout_name = dropout_name
        self.attention_norm = style.build_norm()
        self.attention = attention
        self.cross_attention_norm = None if cross_attention is None else style.build_norm()
        self.cross_attention = cross_attention
        self.feed_forward_norm = style.build_norm()
        self.feed_forward = feed_forward

    def forward(
        self, x_BLD: Tensor, ctx: BatchContext, positions: PositionTable | None = None
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the new residual stream and the records of the block's MoE layers.

        `positions`: positions of the vectors in their sequences, when a dense block gets only some of them.
        """
        positions = positions or ctx.positions
        y_BLD, records = self._attend(self.attention_norm(x_BLD), ctx, positions)
        x_BLD = self._add(x_BLD, y_BLD, self._residual_dropout(ctx, "attention"), positions)
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert ctx.encoder_output is not None
            dropout = self._attention_dropout(ctx, "cross-attention")
            y_BLD = self.cross_attention(self.cross_attention_norm(x_BLD), ctx.encoder_output, dropout)
            x_BLD = self._add(x_BLD, y_BLD, self._residual_dropout(ctx, "cross-attention"), positions)
        x_TD = self.feed_forward_norm(x_BLD).flatten(0, 1)
        if isinstance(self.feed_forward, MoELayer):
            y_TD, record = self.feed_forward(x_TD, ctx.route_in(self.feed_forward, x_BLD))
            records.append(record)
        else:
            y_TD = self.feed_forward(x_TD)
        return self._add(x_BLD, y_TD.view_as(x_BLD), self._residual_dropout(ctx, "feed_forward"), positions), records

    def _attend(
        self, x_BLD: Tensor, ctx: BatchContext, positions: PositionTable | None
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the output of attention, and the record of its experts where there are any."""
        dropout = self._attention_dropout(ctx, "attention")
        if isinstance(self.attention, Attention):
            return self.attention(x_BLD, positions, dropout), []
        y_BLD, record = self.attention(x_BLD, ctx.route_in(self.attention.layer, x_BLD), positions, dropout)
        return y_BLD, [record]

    def _attention_dropout(self, ctx: BatchContext, part: str) -> SequenceDropout | None:
        rate = self.style.attention_dropout
        return ctx.dropout(rate, f"{self.dropout_name}.{part} weights") if rate else None

    def _residual_dropout(self, ctx: BatchContext, part: str) -> SequenceDropout | None:
        rate = self.style.residual_dropout
        return ctx.dropout(rate, f"{self.dropout_name}.{part}") if rate else None

    def _add(
        self, x_BLD: Tensor, y_BLD: Tensor, dropout: SequenceDropout | None, positions: PositionTable | None
    ) -> Tensor:
        """Return the residual stream with the output of one part, scaled and with some values dropped."""
        y_BLD = y_BLD if dropout is None else dropout.drop(y_BLD, positions)
        return x_BLD + (y_BLD if self.style.residual_scale == 1 else self.style.residual_scale * y_BLD)

    def flops_per_token(self, length: int) -> int:
        """Return forward FLOPs per token in a sequence of `length`, without cross-attention (`flops_across`)."""
        return self.attention.flops_per_token(length) + self.feed_forward.flops_per_token()

    def values_per_token(self, length: int) -> int:
        """Return the attention weights of one token that are kept for the backward pass: only dropout keeps them."""
        if self.style.attention_dropout == 0:
            return 0
        num_attentions = 1 if self.cross_attention is None else 2
        return 2 * num_attentions * length * self.attention.style.num_heads  # before and after dropout

    def flops_across(self, length: int, encoder_length: int) -> int:
        """Return the forward FLOPs of the cross-attention of one sequence."""
        return 0 if self.cross_attention is None else self.cross_attention.flops(length, encoder_length)


class Transformer(nn.Module):
    """Blocks and a final norm: x_BLD -> x_BLD and the records of its MoE layers."""

    def __init__(
        self,
        style: StreamStyle,
        blocks: Sequence[nn.Module],
        features: Sequence[Feature] = (),
        dropout_name: str = "input",
    ) -> None:
        """`blocks`: each maps (x_BLD, ctx) to x_BLD and its records. `features`: those that routers require.

        `dropout_name`: name of the input among those of the model, from which its dropout draws.
        """
        super().__init__()
        self.style = style
        self.dropout_name = dropout_name
        self.recomputes_blocks = False
        """Whether the backward pass computes each block again, instead of keeping its activations."""
        self.features = tuple(features)
        self.blocks = nn.ModuleList(blocks)
        self.norm = style.build_norm()

    def forward(self, x_BLD: Tensor, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the normed residual stream and one record per MoE layer, from the bottom."""
        records: list[LayerRecord] = []
        dropout = ctx.dropout(self.style.embedding_dropout, self.dropout_name)
        x_BLD = x_BLD if dropout is None else dropout.drop(x_BLD)
        for block in self.blocks:
            x_BLD, block_records = self._compute(block, x_BLD, ctx)
            records += block_records
            ctx = self._with_layer_features(ctx, block_records)
        return self.norm(x_BLD), records

    def _compute(self, block: nn.Module, x_BLD: Tensor, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the output of a block."""
        result: tuple[Tensor, list[LayerRecord]]
        if self.recomputes_blocks and torch.is_grad_enabled():
            # All draws are functions of the step and the layer: there is no state of generators to restore.
            result = checkpoint(block, x_BLD, ctx, use_reentrant=False, preserve_rng_state=False)
        else:
            result = block(x_BLD, ctx)
        return result

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
