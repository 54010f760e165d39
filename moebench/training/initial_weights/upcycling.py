"""Experts made from one dense network: copies, with noise or with a part of their hidden units drawn again."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from moebench.init_config import UpcycleConfig

INPUT, OUTPUT, INPUT_BIAS = "w_in_DF", "w_out_FD", "b_in_F"
"""Weights of a dense network that depend on its hidden units, by their names in the model."""


def make_expert(network: Mapping[str, Tensor], options: UpcycleConfig, generator: Generator) -> dict[str, Tensor]:
    """Return the weights of an expert that is made from a dense network.

    `network`: w_in_DF, of two parts where it is gated, w_out_FD, and biases. Noise is drawn for both projections, with
    `noise` times the standard deviation of each. Then floor(drop * F) hidden units are drawn again: their columns of
    each part of the input projection and their rows of the output projection, from a normal distribution with the mean
    and the standard deviation that the parent's weights have there (arXiv:2502.19261, section 3).
    """
    expert = {name: value.clone() for name, value in network.items()}
    if options.noise > 0:
        for name in (INPUT, OUTPUT):
            scale = options.noise * network[name].std()
            expert[name] += scale * torch.randn(network[name].shape, generator=generator)
    width = network[OUTPUT].shape[0]
    num_dropped = int(options.drop * width)
    if num_dropped > 0:
        unit_U = torch.randperm(width, generator=generator)[:num_dropped]
        for name, dim in ((INPUT, 1), (OUTPUT, 0), (INPUT_BIAS, 0)):
            if name in network:
                parts = zip(*(torch.split(value, width, dim) for value in (network[name], expert[name])), strict=True)
                for parent_part, part in parts:
                    _draw_again(parent_part, part, unit_U, dim, generator)
    return expert


def _draw_again(parent: Tensor, part: Tensor, unit_U: Tensor, dim: int, generator: Generator) -> None:
    """Replace slices of `part`, in place, by draws with the mean and the deviation of the parent's slices."""
    selected = parent.index_select(dim, unit_U)
    draws = torch.randn(selected.shape, generator=generator)
    part.index_copy_(dim, unit_U, selected.mean() + selected.std(correction=0) * draws)
