"""The backbone: pre-norm transformer blocks whose parts are dense or hold banks of experts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moebench.experts.feed_forward import FeedForward
from moebench.experts.layer import MoELayer
from moebench.models.attention import Attention, CrossAttention, EncoderOutput, PositionTable
from moebench.models.expert_attention import HeadExperts, ProjectionExperts
from moebench.ranks import Span
from moebench.routing.context import RouteContext
from moebench.routing.layer_name import LayerName
from moebench.routing.values import LayerRecord
from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchContext:
    """What a forward pass knows besides the vectors; each MoE layer gets its own RouteContext from it."""

    training: bool
    seed: int
    step: int = 0
    token_id_BL: Tensor | None = None
    valid_BL: Tensor | None = None
    domain_B: Tensor | None = None
    label_BL: Tensor | None = None
    embedding_BLD: Tensor | None = None
    """What the network that all routers share says of each token; None: there is none."""
    memory: EncoderOutput | None = None
    """What the encoder made, in a decoder."""
    span: Span | None = None
    """Which sequences of the batch these are; None: all."""
    micro_batch: int = 0
    """Which micro-batch of the step, or batch of the evaluation, this is: each draws its own noise."""
    repeat: int = 0
    """Which pass over the batch this is, where training makes two of them: each draws its own noise."""
    previous_logits_TE: Tensor | None = None
    """Router logits of the last MoE layer below the block; None: none."""

    @property
    def places(self) -> PositionTable | None:
        """Where padding is; None where nothing is padded."""
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
            label_T=None if self.label_BL is None else self.label_BL.reshape(-1),
            embedding_TD=None if self.embedding_BLD is None else self.embedding_BLD.flatten(0, 1),
            step=self.step,
            span=None if self.span is None else self.span.to_tokens(length),
            previous_logits_TE=self.previous_logits_TE,
        )


class Block(nn.Module):
    """Attention and feed-forward part, each behind a norm and added to the residual stream; either can hold experts.

    In a decoder that reads an encoder, cross-attention stands between them.
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
        self, x_BLD: Tensor, ctx: BatchContext, places: PositionTable | None = None
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the new residual stream and the records of the block's MoE layers.

        `places` says where the vectors stand in their sequences when a dense block sees only some of them.
        """
        places = places or ctx.places
        records = []
        x_normed_BLD = self.attention_norm(x_BLD)
        if isinstance(self.attention, Attention):
            y_BLD = self.attention(x_normed_BLD, places)
        else:
            y_BLD, record = self.attention(x_normed_BLD, ctx.route_in(self.attention.layer, x_BLD), places)
            records.append(record)
        x_BLD = x_BLD + y_BLD
        if self.cross_attention is not None and self.cross_attention_norm is not None:
            assert ctx.memory is not None
            x_BLD = x_BLD + self.cross_attention(self.cross_attention_norm(x_BLD), ctx.memory)
        x_TD = self.feed_forward_norm(x_BLD).flatten(0, 1)
        if isinstance(self.feed_forward, MoELayer):
            y_TD, record = self.feed_forward(x_TD, ctx.route_in(self.feed_forward, x_BLD))
            records.append(record)
        else:
            y_TD = self.feed_forward(x_TD)
        return x_BLD + y_TD.view_as(x_BLD), records

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of one token in a sequence of `length`; cross-attention is counted apart (`flops_across`)."""
        return self.attention.flops_per_token(length) + self.feed_forward.flops_per_token()

    def flops_across(self, length: int, memory_length: int) -> int:
        """Forward FLOPs of the cross-attention of one sequence."""
        return 0 if self.cross_attention is None else self.cross_attention.flops(length, memory_length)


class Transformer(nn.Module):
    """Blocks and a final norm: x_BLD -> x_BLD and the records of its MoE layers."""

    def __init__(self, d_model: int, blocks: Sequence[nn.Module]) -> None:
        """`blocks`: each maps (x_BLD, ctx) to x_BLD and its records."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.RMSNorm(d_model)

    def forward(self, x_BLD: Tensor, ctx: BatchContext) -> tuple[Tensor, list[LayerRecord]]:
        """Return the normed residual stream and one record per MoE layer, from the bottom."""
        records: list[LayerRecord] = []
        for block in self.blocks:
            x_BLD, found = block(x_BLD, ctx)
            records += found
            if found:
                ctx = replace(ctx, previous_logits_TE=found[-1].routing.logits_TE)
        return self.norm(x_BLD), records

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in the order of the records; none in a dense model."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]


def init_weights(model: nn.Module, seed: int) -> None:
    """Initialise every module from a generator seeded by the run's seed and the module's name.

    So two arms with the same seed start with identical weights in everything they share, whatever else differs:
    paired seeds pair.
    """
    for name, module in model.named_modules():
        init = getattr(module, "init_weights", None)
        if init is not None:
            init(make_generator(seed, "init", name))
