"""Where the linear maps of a parameter are: what optimizers and width scaling need to know of a module's weights.

A module states it by a method `linear_maps`, which returns a `LinearMap` for each parameter that holds maps, by the
parameter's name. Every other parameter of such a module counts as a vector, or as a stack of one vector for each expert
(biases, gains). `nn.Linear` and `nn.Embedding` need no statement.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LinearMap:
    """The dimensions of a parameter that holds one matrix, or a stack of matrices along all other dimensions."""

    in_dim: int | None
    """Dimension of the input, counted from the end; None: a table of vectors, such as an embedding."""
    out_dim: int
    """Dimension of the output, counted from the end."""
    out_parts: tuple[int, ...] = ()
    """Sizes of matrices that lie side by side along the output, such as queries, keys and values; empty: one matrix."""
    is_gate: bool = False
    """Whether the outputs are logits: orthogonal rows have no meaning for them, so Muon leaves the matrix to AdamW."""

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Return views [..., output, input], one for each part."""
        assert self.in_dim is not None
        maps = tensor.movedim((self.out_dim, self.in_dim), (-2, -1))
        return list(torch.split(maps, list(self.out_parts), dim=-2)) if self.out_parts else [maps]


INPUT_FIRST = LinearMap(in_dim=-2, out_dim=-1)
"""A parameter [..., input, output], for x @ W."""
OUTPUT_FIRST = LinearMap(in_dim=-1, out_dim=-2)
"""A parameter [..., output, input], as in `nn.Linear`."""
TABLE = LinearMap(in_dim=None, out_dim=-1)
"""A parameter [..., entry, output]: its vectors are looked up, or are the same for all inputs."""


@runtime_checkable
class HasLinearMaps(Protocol):
    """A module that states its linear maps."""

    def linear_maps(self) -> Mapping[str, LinearMap]:
        """Return the map of each parameter that holds one, by its name in the module."""


def find_linear_maps(model: nn.Module) -> tuple[dict[int, LinearMap], set[int]]:
    """Return the maps of a model's parameters by `id(parameter)`, and the ids of those that are stacks of vectors.

    What a module states of a parameter of a submodule precedes what the submodule states.
    """
    maps: dict[int, LinearMap] = {}
    vectors: set[int] = set()
    for module in model.modules():  # from the outside to the inside
        stated: Mapping[str, LinearMap] = {}
        if isinstance(module, HasLinearMaps):
            stated = module.linear_maps()
            vectors |= {id(p) for name, p in module.named_parameters(recurse=False) if name not in stated}
        elif isinstance(module, nn.RMSNorm | nn.LayerNorm):
            vectors |= {id(parameter) for parameter in module.parameters(recurse=False)}
        elif isinstance(module, nn.Linear):
            stated = {"weight": OUTPUT_FIRST}
        elif isinstance(module, nn.Embedding):
            stated = {"weight": TABLE}
        for name, linear_map in stated.items():
            maps.setdefault(id(module.get_parameter(name)), linear_map)
    return maps, vectors
