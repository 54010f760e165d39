"""The cost of a model: parameters and FLOPs, counted on its modules before it runs, and executed FLOPs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor, nn

from moebench.experts.layer import MoELayer
from moebench.models.encoder_decoder import EncoderDecoder
from moebench.models.transformer import Block, Transformer
from moebench.models.whole_model import WholeModels
from moebench.routing.layer_name import LayerName

Backbone = Transformer | EncoderDecoder
Number = TypeVar("Number", float, Tensor)
"""In Python, or on a device."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Planned cost of a model: for an even load, nothing dropped, and the nominal number of experts."""

    total_params: int
    active_params: int
    """Parameters that one token uses on average; of a bank, its rows per token over its number of experts."""
    flops_per_token: int
    """Forward FLOPs of one token in a full sequence, 2 per multiplication and addition; a training pass, forward and
    backward, costs 3 times this. With an encoder and a decoder: the mean over the tokens of both."""
    experts_per_token: float
    """Rows that experts compute for one token, mean over MoE layers; 0 in a dense model."""
    train_passes: int = 1
    """How often training runs each token through the model."""
    training_only_flops: int = 0
    """Forward FLOPs of one token that only training computes, in addition to its passes."""

    @property
    def training_flops(self) -> int:
        """Forward FLOPs of one token in training: all passes, and what only training computes."""
        return self.train_passes * self.flops_per_token + self.training_only_flops


def compute_cost(
    backbone: Backbone,
    extra: list[nn.Module],
    sequence_length: int,
    decoder_length: int | None = None,
) -> Cost:
    """Count a backbone and the modules around it: 2 per weight of a linear map, or their own `flops_per_token`.

    Where experts differ in size, what a token uses is the mean at an even load. Of two backbones, the active parameters
    are those that one token of each uses.
    """
    total = sum(parameter.numel() for module in (backbone, *extra) for parameter in module.parameters())
    layers = backbone.moe_layers()
    flops = sum(count_flops(module, sequence_length) for module in extra)
    if isinstance(backbone, EncoderDecoder):
        assert decoder_length is not None
        # The modules around the backbone, such as the head, run on the decoder.
        pair_flops = backbone.flops(sequence_length, decoder_length) + decoder_length * flops
        flops = round(pair_flops / (sequence_length + decoder_length))
    else:
        for block in backbone.blocks:
            assert isinstance(block, Block | WholeModels)
            flops += block.flops_per_token(sequence_length)
    return Cost(
        total_params=total,
        active_params=total - sum(_idle_params(layer) for layer in layers),
        flops_per_token=flops,
        experts_per_token=sum(layer.rows_per_token for layer in layers) / max(len(layers), 1),
    )


def _idle_params(layer: MoELayer) -> int:
    """Return the parameters of a layer's bank that one token does not use, on average."""
    bank, used = layer.bank, layer.rows_per_token
    num_params = sum(parameter.numel() for parameter in bank.parameters())
    return int(num_params * max(bank.num_experts - used, 0) // bank.num_experts)


def executed_flops_per_token(
    backbone: Backbone,
    planned: int,
    excess: Mapping[LayerName, Number],
    sequence_length: int,
    decoder_length: int | None = None,
) -> float | Number:
    """Return the forward FLOPs per token that a model executed: the plan plus the excess of its MoE layers.

    `planned`: `Cost.flops_per_token` for the same lengths. `excess`: executed minus planned FLOPs of the router and
    experts of each MoE layer, per position. Everything else costs the same for every token.
    """
    if not isinstance(backbone, EncoderDecoder):
        return planned + sum(excess.values())
    assert decoder_length is not None
    halves = ((backbone.encoder, sequence_length), (backbone.decoder, decoder_length))
    pair_excess = sum(length * excess[layer.name] for half, length in halves for layer in half.moe_layers())
    return planned + pair_excess / (sequence_length + decoder_length)


def count_flops(module: nn.Module, length: int) -> int:
    """Return the forward FLOPs of one token in a module around the backbone."""
    counted: Callable[[int], int] | None = getattr(module, "flops_per_token", None)
    if counted is not None:
        return counted(length)
    return 2 * module.weight.numel() if isinstance(module, nn.Linear) else 0
