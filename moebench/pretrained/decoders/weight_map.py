"""Where a weight of moebench is among the weights of a checkpoint of transformers, in both directions."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Part:
    """One tensor of a checkpoint."""

    names: tuple[str, ...]
    """Its name, and others under which it may be stored."""
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """The name under which it is written."""
        return self.names[0]


@dataclass(frozen=True, kw_only=True)
class FusedStack:
    """One tensor that holds the parts of all experts, [E, rows, columns]: how transformers has them in memory."""

    names: tuple[str, ...]
    shape: tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class WeightMap:
    """A weight of ours, made of parts that are stacked over experts, concatenated by rows and transposed."""

    name: str
    """In `Model.state_dict()`."""
    experts: tuple[tuple[Part, ...], ...]
    """For each expert its parts; one entry where there is no stack."""
    is_transposed: bool = False
    """Whether ours has the input first, where torch's linear layers have the output first."""
    is_stack: bool = False
    factor: float = 1.0
    """On our weight, where theirs is written."""
    fused: FusedStack | None = None
    """The form in which a checkpoint may have all experts in one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of our weight."""
        first, *others = self.experts[0]
        shape = first.shape
        if others:
            shape = (shape[0] + sum(part.shape[0] for part in others), *shape[1:])
        shape = shape[::-1] if self.is_transposed else shape
        return (len(self.experts), *shape) if self.is_stack else shape

    def parts(self) -> Iterator[Part]:
        """Yield all parts."""
        for parts in self.experts:
            yield from parts

    def join(self, read: Callable[[Part], Tensor]) -> Tensor:
        """Return our weight from its parts; `read` returns one part."""
        if not self.is_stack:
            joined = self._join_one([read(part) for part in self.experts[0]])
            return joined if self.factor == 1 else joined / self.factor
        first = self._join_one([read(part) for part in self.experts[0]])
        stack = first.new_empty(len(self.experts), *first.shape)
        stack[0] = first
        for index, parts in enumerate(self.experts[1:], start=1):  # not all experts twice in memory
            stack[index] = self._join_one([read(part) for part in parts])
        return stack

    def unfuse(self, fused: Tensor) -> Tensor:
        """Return our weight from the tensor that has the parts of all experts."""
        return fused.mT.contiguous() if self.is_transposed else fused

    def split(self, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and the value of each part of our weight."""
        value = value if self.factor == 1 else self.factor * value
        values = value.unbind(0) if self.is_stack else (value,)
        for parts, one in zip(self.experts, values, strict=True):
            rows = one.mT if self.is_transposed else one
            pieces = torch.split(rows, [part.shape[0] for part in parts])
            yield from ((part.name, piece) for part, piece in zip(parts, pieces, strict=True))

    def _join_one(self, parts: Sequence[Tensor]) -> Tensor:
        joined = parts[0] if len(parts) == 1 else torch.cat(list(parts))
        return joined.mT.contiguous() if self.is_transposed else joined


def map_one(name: str, *parts: tuple[str, tuple[int, ...]], is_transposed: bool = False) -> WeightMap:
    """Return the map of a weight that is one tensor, or several below each other: (name, shape) of each."""
    stored = tuple(Part(names=(part, *_other_names(part)), shape=shape) for part, shape in parts)
    return WeightMap(name=name, experts=(stored,), is_transposed=is_transposed)


def _other_names(name: str) -> tuple[str, ...]:
    """Return the names that transformers reads too: Mixtral's modules have had two."""
    old, new = ".block_sparse_moe.", ".mlp."
    return (name.replace(old, new),) if old in name else ()


def map_stack(
    name: str, num_experts: int, prefix: str, parts: Sequence[tuple[str, tuple[int, int]]], fused: str
) -> WeightMap:
    """Return the map of a stack of experts: `prefix`.0.PART.weight for each part, or `prefix`.`fused` for all."""

    def part(expert: int, part_name: str, shape: tuple[int, int]) -> Part:
        stored = f"{prefix}.{expert}.{part_name}.weight"
        return Part(names=(stored, *_other_names(stored)), shape=shape)

    rows, columns = sum(shape[0] for _, shape in parts), parts[0][1][1]
    fused_name = f"{prefix}.{fused}"
    return WeightMap(
        name=name,
        experts=tuple(tuple(part(expert, *each) for each in parts) for expert in range(num_experts)),
        is_transposed=True,
        is_stack=True,
        fused=FusedStack(names=(fused_name, *_other_names(fused_name)), shape=(num_experts, rows, columns)),
    )
