"""Initial weights of feed-forward parts that arms share although their networks differ in number and width.

A block has one stream of hidden units, each a pair of vectors: what it reads and what it adds. A dense network takes
the first units, a bank of experts takes units too, expert after expert. So a dense network of the width of k experts is
the first k experts side by side, and arms with other numbers or widths of experts start from the same units.
"""

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from moebench.experts.activation import GATED
from moebench.experts.bank import is_sharded, local_shard
from moebench.experts.feed_forward import ExpertBank, FeedForward
from moebench.experts.layer import MoELayer
from moebench.experts.mixed import MixedBank
from moebench.models.transformer import Block
from moebench.seeds import make_generator

PURPOSE = "init units"


def pair_initial_weights(model: nn.Module, seed: int) -> None:
    """Draw the weights of feed-forward parts again, in place, unit by unit from one stream for each block.

    Biases, deep experts and experts of attention keep the weights that they have. Every process draws all the units
    and keeps those of its own experts.
    """
    for name, block in model.named_modules():
        if isinstance(block, Block):
            generators = tuple(make_generator(seed, PURPOSE, name, part) for part in ("in", "out"))
            for network in _list_networks(block.feed_forward):
                _draw_units(network, *generators)


def _list_networks(part: nn.Module | None) -> Iterator[FeedForward | ExpertBank]:
    """Yield the networks of a part in the order of their units: shared ones, which every token uses, come first."""
    if isinstance(part, FeedForward | ExpertBank):
        yield part
    elif isinstance(part, MoELayer):
        yield from _list_networks(part.shared)
        yield from _list_networks(part.bank)
    elif isinstance(part, MixedBank):
        for group in part.groups:
            yield from _list_networks(group)


def _draw_units(network: FeedForward | ExpertBank, read: Generator, write: Generator) -> None:
    w_in, w_out = _get_stacks(network)
    num_local, num_experts = local_shard(w_in).shape[0], w_in.shape[0]
    first = num_local * w_in.device_mesh.get_local_rank("expert") if is_sharded(w_in) else 0
    width, d_model = w_out.shape[1:]
    with torch.no_grad():
        for expert in range(num_experts):
            in_FPD = _draw((width, 1 + GATED[network.activation], d_model), read)  # P: the parts of a gated projection
            out_FD = _draw((width, d_model), write)
            if first <= expert < first + num_local:
                local_shard(w_in)[expert - first].copy_(in_FPD.permute(2, 1, 0).flatten(1) * d_model**-0.5)
                local_shard(w_out)[expert - first].copy_(out_FD * (network.out_scale * width**-0.5))


def _get_stacks(network: FeedForward | ExpertBank) -> tuple[Tensor, Tensor]:
    """Return both projections of the experts, [E, D, F] and [E, F, D]; of a dense network those of one expert."""
    if isinstance(network, ExpertBank):
        return network.w_in_EDF, network.w_out_EFD
    return network.w_in_DF.unsqueeze(0), network.w_out_FD.unsqueeze(0)


def _draw(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.empty(shape).normal_(generator=generator)
