"""The tensors of an exported folder, one at a time, in the order in which they are written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.pretrained.decoders.architecture import Architecture
from moebench.pretrained.decoders.architectures import ARCHITECTURES
from moebench.pretrained.decoders.decoder import Decoder
from moebench.pretrained.decoders.weight_map import WeightMap
from moebench.pretrained.export.describe import describe_decoder, list_sources
from moebench.pretrained.export.routing_rules import NOT_IN_EVALUATION
from moebench.schema import CellConfig

KEPT_IN_FP32 = (".router.bias_E",)
"""Endings of weights that stay in fp32 in every type: a selection bias moves by 0.001 per step."""


@dataclass(frozen=True, kw_only=True)
class TensorEntry:
    """A tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size on the disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True, eq=False)
class TensorSource:
    """All tensors of a folder: what they are, and their values in the same order."""

    weights: Mapping[str, Tensor]
    """`Model.state_dict()`."""
    dtype: torch.dtype

    def list_entries(self) -> list[TensorEntry]:
        """Return the tensors by their names in the folder."""
        return [
            TensorEntry(name=name, shape=tuple(value.shape), dtype=self.choose_dtype(name, value))
            for name, value in self.weights.items()
        ]

    def read(self) -> Iterator[Tensor]:
        """Yield the values; each has memory of its own."""
        for name, value in self.weights.items():
            yield _copy(value, self.choose_dtype(name, value))

    def choose_dtype(self, name: str, value: Tensor) -> torch.dtype:
        """Return the type in which a weight is written."""
        return self.dtype if value.is_floating_point() and not name.endswith(KEPT_IN_FP32) else value.dtype


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderSource(TensorSource):
    """The tensors of a decoder by the names of transformers."""

    config: CellConfig
    decoder: Decoder
    architecture: Architecture

    def list_entries(self) -> list[TensorEntry]:
        """Return the tensors by their names in the folder."""
        entries = [
            TensorEntry(name=part.name, shape=part.shape, dtype=self._dtype_of(weight.name))
            for weight in self.architecture.map_weights(self.decoder)
            for part in weight.parts()
        ]
        empty = self.architecture.list_empty(self.decoder)
        return entries + [TensorEntry(name=name, shape=shape, dtype=self.dtype) for name, shape in empty.items()]

    def read(self) -> Iterator[Tensor]:
        """Yield the values; each has memory of its own."""
        sources = list_sources(self.config, self.decoder)
        for weight in self.architecture.map_weights(self.decoder):
            source, factor = sources.get(weight.name, (weight.name, 1.0))
            value = self.weights[source] if factor == 1 else factor * self.weights[source]
            for _, part in weight.split(pad_units(value, weight)):
                yield _copy(part, self._dtype_of(weight.name))
        for shape in self.architecture.list_empty(self.decoder).values():
            yield torch.zeros(shape, dtype=self.dtype)

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if name.endswith(KEPT_IN_FP32) else self.dtype


def describe_for_transformers(config: CellConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> DecoderSource:
    """Return the tensors of a model as an architecture of transformers has them.

    Raises UsageError, with the keys and values that are the reason, where no architecture computes the same.
    """
    decoder = describe_decoder(config, {name: tuple(value.shape) for name, value in weights.items()})
    architecture = choose_architecture(decoder)
    sources = list_sources(config, decoder)
    read = {sources.get(weight.name, (weight.name, 1.0))[0] for weight in architecture.map_weights(decoder)}
    rest = [name for name in weights if name not in read and not name.endswith(NOT_IN_EVALUATION)]
    if rest:
        raise UsageError(f"the weight {rest[0]} has no place in {architecture.class_name}")
    return DecoderSource(weights=weights, dtype=dtype, config=config, decoder=decoder, architecture=architecture)


def choose_architecture(decoder: Decoder) -> Architecture:
    """Return the plainest architecture that computes a decoder; raise UsageError, with all reasons, where none does."""
    names: dict[str, list[str]] = {}
    for architecture in ARCHITECTURES.values():
        if (architecture.experts is None) != (decoder.experts is None):
            continue
        problem = architecture.find_problem(decoder)
        if problem is None:
            return architecture
        names.setdefault(problem, []).append(architecture.model_type)
    reasons = "; ".join(f"not {', '.join(those)}: {problem}" for problem, those in names.items())
    raise UsageError(f"no decoder of transformers computes it ({reasons})")


def pad_units(value: Tensor, weight: WeightMap) -> Tensor:
    """Return a weight of experts with hidden units of weight 0 added, up to the width that is written."""
    if tuple(value.shape) == weight.shape:
        return value
    padded = value.new_zeros(weight.shape)
    if value.shape[-1] == weight.shape[-1]:  # the output projection: units are rows
        padded[..., : value.shape[-2], :] = value
        return padded
    num_parts = len(weight.experts[0])  # gate and value, side by side
    for target, part in zip(padded.chunk(num_parts, dim=-1), value.chunk(num_parts, dim=-1), strict=True):
        target[..., : part.shape[-1]] = part
    return padded


def _copy(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(device="cpu", dtype=dtype, copy=True).contiguous()
