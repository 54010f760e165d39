"""An encoder that attends in both directions, and a causal decoder that attends to the encoder's output."""

from dataclasses import replace

from torch import Tensor, nn

from moebench.experts.layer import MoELayer
from moebench.models.attention import EncoderOutput
from moebench.models.transformer import BatchContext, Block, Transformer
from moebench.routing.values import LayerRecord


class EncoderDecoder(nn.Module):
    """Encoder and decoder (arXiv:1706.03762), pre-norm, each with its own experts.

    The decoder's blocks have cross-attention. MoE layers are named "encoder.0", "decoder.0" and so on.
    """

    def __init__(self, encoder: Transformer, decoder: Transformer) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self, x_BMD: Tensor, ctx: BatchContext, x_BPD: Tensor, decoder_ctx: BatchContext
    ) -> tuple[Tensor, list[LayerRecord]]:
        """Return the decoder's normed stream [B, P, D], and the records of the encoder and then of the decoder."""
        memory_BMD, records = self.encoder(x_BMD, ctx)
        encoder_output = EncoderOutput.of(memory_BMD, ctx.positions)
        y_BPD, decoder_records = self.decoder(x_BPD, replace(decoder_ctx, encoder_output=encoder_output))
        return y_BPD, records + decoder_records

    def moe_layers(self) -> list[MoELayer]:
        """Return the MoE layers in the order of the records."""
        return [*self.encoder.moe_layers(), *self.decoder.moe_layers()]

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks of the encoder, then those of the decoder."""
        return [*self.encoder.blocks, *self.decoder.blocks]

    def flops(self, length: int, decoder_length: int) -> int:
        """Return the forward FLOPs of one pair of sequences: `length` vectors encoded, `decoder_length` decoded."""
        total = 0
        for backbone, stack_length in ((self.encoder, length), (self.decoder, decoder_length)):
            for block in backbone.blocks:
                assert isinstance(block, Block)
                total += stack_length * block.flops_per_token(stack_length) + block.flops_across(stack_length, length)
        return total
