"""What a model costs: parameters and FLOPs, counted on its modules before it runs, and as it executed them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.transformer import Block, Transformer
from moebench.models.whole_model import WholeModels

Backbone = Transformer | EncoderDecoder


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a model costs as planned: for an even load, nothing dropped, and the nominal number of experts."""

    total_params: int
    active_params: int
    """Parameters that one token uses on average: of a bank, the share rows per token / experts."""
    flops_per_token: int
    """Forward FLOPs of one token in a full sequence, 2 per multiplication and addition; a pass of training, which goes
    backward too, costs 3 times this. With an encoder and a decoder: the mean over the tokens of both."""
    experts_per_token: float
    """Rows that experts compute for one token, mean over MoE layers; 0 in a dense model."""
    train_passes: int = 1
    """How often training runs each token through the model."""
    training_only_flops: int = 0
    """Forward FLOPs of one token in what training alone computes, beside its passes."""

    @property
    def training_flops(self) -> int:
        """Forward FLOPs of training for one token: of all passes, and of what training alone computes."""
        return self.train_passes * self.flops_per_token + self.training_only_flops


def cost_of(
    backbone: Backbone,
    extra: list[nn.Module],
    sequence_length: int,
    decoder_length: int | None = None,
) -> Cost:
    """Count a backbone and the modules around it: 2 per weight of a linear map, or what `flops_per_token` says.

    Where experts differ in size, what a token uses is the mean at an even load. Of two backbones, the active parameters
    are those that one token of each uses.
    """
    total = sum(parameter.numel() for module in (backbone, *extra) for parameter in module.parameters())
    idle, layers = 0, backbone.moe_layers()
    for layer in layers:
        of_bank = sum(parameter.numel() for parameter in layer.bank.parameters())
        used = layer.rows_per_token
        idle += int(of_bank * max(layer.bank.num_experts - used, 0) // layer.bank.num_experts)
    flops = sum(count_flops(module, sequence_length) for module in extra)
    if isinstance(backbone, EncoderDecoder):
        assert decoder_length is not None
        whole = backbone.flops(sequence_length, decoder_length) + decoder_length * flops  # the head reads the decoder
        flops = round(whole / (sequence_length + decoder_length))
    else:
        for block in backbone.blocks:
            assert isinstance(block, Block | WholeModels)
            flops += block.flops_per_token(sequence_length)
    return Cost(
        total_params=total,
        active_params=total - idle,
        flops_per_token=flops,
        experts_per_token=sum(layer.rows_per_token for layer in layers) / max(len(layers), 1),
    )


def executed_flops_per_token(
    backbone: Backbone,
    planned: int,
    excess: Mapping[int | str, float],
    sequence_length: int,
    decoder_length: int | None = None,
) -> float:
    """Return the forward FLOPs per token of a model as it ran: the plan, and what its MoE layers executed beyond it.

    `planned`: `Cost.flops_per_token` for the same lengths. `excess`: MoE layer -> executed minus planned FLOPs of its
    router and experts, per position. All else costs the same for every token.
    """
    if not isinstance(backbone, EncoderDecoder):
        return planned + sum(excess.values())
    assert decoder_length is not None
    halves = ((backbone.encoder, sequence_length), (backbone.decoder, decoder_length))
    whole = sum(length * excess[layer.name] for half, length in halves for layer in half.moe_layers())
    return planned + whole / (sequence_length + decoder_length)


def count_flops(module: nn.Module, length: int) -> int:
    """Return the forward FLOPs of one token in a module around the backbone."""
    counted: Callable[[int], int] | None = getattr(module, "flops_per_token", None)
    if counted is not None:
        return counted(length)
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
