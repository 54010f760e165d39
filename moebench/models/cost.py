"""What a model costs: parameters and FLOPs, counted on its modules."""

from collections.abc import Callable
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
    """Parameters that one token uses on average: of a bank, the share rows per token / experts."""
    flops_per_token: int
    """Forward FLOPs of one token in a full sequence, 2 per multiplication and addition; a pass of training, which goes
    backward too, costs 3 times this. With an encoder and a decoder: the mean over the tokens of both."""
    train_passes: int = 1
    """How often training runs each token through the model."""


def cost_of(
    backbone: Transformer | EncoderDecoder,
    extra: list[nn.Module],
    sequence_length: int,
    decoder_length: int | None = None,
) -> Cost:
    """Count a backbone and the modules around it: 2 per weight of a linear map, or what `flops_per_token` says.

    Where experts differ in size, what a token uses is the mean at an even load. Of two backbones, the active parameters
    are those that one token of each uses.
    """
    total = sum(parameter.numel() for module in (backbone, *extra) for parameter in module.parameters())
    idle, passes = 0, 1
    for layer in backbone.moe_layers():
        of_bank = sum(parameter.numel() for parameter in layer.bank.parameters())
        used = layer.router.rows_per_token(layer.experts_per_token)
        idle += int(of_bank * max(layer.bank.num_experts - used, 0) // layer.bank.num_experts)
        passes = 2 if layer.router.consistency else passes
    flops = sum(_flops_around(module, sequence_length) for module in extra)
    if isinstance(backbone, EncoderDecoder):
        assert decoder_length is not None
        whole = backbone.flops(sequence_length, decoder_length) + decoder_length * flops  # the head reads the decoder
        flops = round(whole / (sequence_length + decoder_length))
    else:
        for block in backbone.blocks:
            assert isinstance(block, Block | WholeModels)
            flops += block.flops_per_token(sequence_length)
    return Cost(total_params=total, active_params=total - idle, flops_per_token=flops, train_passes=passes)


def _flops_around(module: nn.Module, length: int) -> int:
    counted: Callable[[int], int] | None = getattr(module, "flops_per_token", None)
    if counted is not None:
        return counted(length)
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
