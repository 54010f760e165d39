"""What a model costs: parameters and FLOPs, counted on its modules."""

from dataclasses import dataclass

from torch import nn

from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.transformer import Block, Transformer
from moebench.models.whole_model import WholeModels


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs, counted exactly."""

    total_params: int
    active_params: int
    """Parameters that one token uses: of a bank, the share experts per token / experts."""
    flops_per_token: int
    """Forward FLOPs of one token in a full sequence, 2 per multiplication and addition; training costs 3 times this.
    With an encoder and a decoder: the mean over the tokens of both."""


def cost_of(
    backbone: Transformer | EncoderDecoder,
    extra: list[nn.Module],
    sequence_length: int,
    decoder_length: int | None = None,
) -> Cost:
    """Count a backbone and the modules around it (embedding: no FLOPs; head: 2 per weight).

    Where experts differ in size, what a token uses is the mean at an even load. Of two backbones, the active parameters
    are those that one token of each uses.
    """
    total = sum(parameter.numel() for module in (backbone, *extra) for parameter in module.parameters())
    idle = 0
    for layer in backbone.moe_layers():
        of_bank = sum(parameter.numel() for parameter in layer.bank.parameters())
        idle += of_bank * (layer.bank.num_experts - layer.experts_per_token) // layer.bank.num_experts
    flops = sum(2 * module.weight.numel() for module in extra if isinstance(module, nn.Linear))
    if isinstance(backbone, EncoderDecoder):
        assert decoder_length is not None
        whole = backbone.flops(sequence_length, decoder_length) + decoder_length * flops  # the head reads the decoder
        flops = round(whole / (sequence_length + decoder_length))
    else:
        for block in backbone.blocks:
            assert isinstance(block, Block | WholeModels)
            flops += block.flops_per_token(sequence_length)
    return Cost(total_params=total, active_params=total - idle, flops_per_token=flops)
