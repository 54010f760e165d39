"""A pretrained model as a cell of moebench: its settings, and its weights by our names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from moebench.errors import UsageError
from moebench.pretrained.decoders.architectures import ARCHITECTURES, NOT_COMPUTED
from moebench.pretrained.decoders.config_keys import ConfigKeys
from moebench.pretrained.decoders.decoder import Decoder, RoutingRule
from moebench.pretrained.decoders.expert_format import GATED_WIDTH
from moebench.pretrained.decoders.weight_map import Part, WeightMap, map_one
from moebench.pretrained.families import CONFIG, OWN_FORMAT
from moebench.pretrained.folder import PretrainedFolder
from moebench.pretrained.model import build_config, quiet_library
from moebench.pretrained.tokenizer import TOKENIZER, name_tokenizer, read_tokenizer
from moebench.pretrained.weights import StoredTensor

CELL = "moebench"
"""Key of config.json with the cell of a model that moebench wrote with its own names of weights."""
OWN_SECTIONS = ("model", "layout", "router")
VOCABULARY = ("embedding.weight", "head.weight")
"""Weights with a row for each token id."""
MODEL_KEYS = (
    *("d_model", "num_layers", "num_heads", "num_kv_heads", "ffn_width", "activation", "attention_bias", "ffn_bias"),
    *("norm", "norm_eps", "qk_norm", "tie_embeddings", "embedding_scale", "rope_theta", "rope_scaling", "rope_factor"),
    *("rope_original_length", "rope_low_frequency", "rope_high_frequency"),
)
"""Keys of the section `model` that a checkpoint determines; the others are options of training."""
UNUSED_ENDINGS = (".rotary_emb.inv_freq",)
"""Stored tensors that are computed from the configuration."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ParentModel:
    """A model whose training can continue in a cell with these settings."""

    folder: PretrainedFolder
    settings: Mapping[str, Any]
    """Sections `model`, `layout`, `router`, and the key `task.data.tokenizer`, as `config.resolve` takes them."""
    weights: "ParentWeights"
    """Name in `Model.state_dict()` -> value, read from the disk each time."""
    vocab_size: int
    """Ids of the tokenizer: rows of the embedding without padding."""
    routing: RoutingRule | None = None
    """How experts are chosen in a model of transformers, whose `settings` have one of the routers that compute this."""
    cell: Mapping[str, Any] | None = None
    """All sections of the run that moebench wrote with its own names of weights; None for models of transformers."""


class ParentWeights(Mapping[str, Tensor]):
    """The weights of a folder by our names; each is read from the disk, in its stored type, when it is asked for."""

    def __init__(
        self, tensors: Mapping[str, StoredTensor], maps: Mapping[str, WeightMap], vocab_size: int | None
    ) -> None:
        """`vocab_size`: rows of the embedding and the head that are read; those after them are padding. None: all."""
        self._tensors, self._maps, self._vocab_size = tensors, maps, vocab_size
        self._files: dict[Path, Any] = {}  # memory-mapped: opening one reads the names of all its tensors

    @override
    def __getitem__(self, name: str) -> Tensor:
        weight = self._maps[name]
        fused = _find_stored(weight.fused.names, self._tensors) if weight.fused else None
        value = weight.unfuse(self._read(fused)) if fused else weight.join(self._read_part)
        return value[: self._vocab_size] if name in VOCABULARY else value

    def _read_part(self, part: Part) -> Tensor:
        name = _find_stored(part.names, self._tensors)
        assert name is not None
        return self._read(name)

    def _read(self, name: str) -> Tensor:
        from safetensors import SafetensorError, safe_open

        file = self._tensors[name].file
        try:
            if file not in self._files:
                self._files[file] = safe_open(file, framework="pt")
            value: Tensor = self._files[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"{file}: the weight {name} cannot be read ({error})") from error
        return value.to(torch.float32) if value.dtype == torch.float64 else value

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    @override
    def __len__(self) -> int:
        return len(self._maps)

    def is_not_zero(self, stored_name: str) -> bool:
        """Return whether a stored weight is there and has another value than 0."""
        return stored_name in self._tensors and bool(self._read(stored_name).any())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight; nothing is read."""
        return {name: self._shape(weight) for name, weight in self._maps.items()}

    def _shape(self, weight: WeightMap) -> tuple[int, ...]:
        if self._vocab_size is None or weight.name not in VOCABULARY:
            return weight.shape
        return (self._vocab_size, *weight.shape[1:])


def read_parent(folder: PretrainedFolder) -> ParentModel:
    """Return the model of a folder; no weight is read yet but gates of shared experts, which must be 0.

    Raises UsageError, in one line that names the key of config.json or the weight, for what moebench does not compute:
    other activations, attention, positions or routing; and for missing, additional or differently shaped weights, and a
    missing tokenizer.
    """
    file = str(folder.path / CONFIG)
    model_type = folder.family.model_type
    if model_type == OWN_FORMAT:
        return _read_own(folder, file)
    if model_type in NOT_COMPUTED:
        raise UsageError(f"{file}: model_type is {model_type}: {NOT_COMPUTED[model_type]}")
    architecture = ARCHITECTURES[model_type]
    try:
        decoder = architecture.read(_read_keys(folder, file))
    except UsageError as error:
        raise error if str(error).startswith(file) else UsageError(f"{file}: {error}") from error
    maps = {weight.name: weight for weight in architecture.map_weights(decoder)}
    _require_weights(folder, maps, set(architecture.list_empty(decoder)), decoder)
    weights = ParentWeights(folder.tensors, maps, None)
    gate = next((name for name in architecture.list_gates(decoder) if weights.is_not_zero(name)), None)
    if gate:
        raise UsageError(
            f"{file}: {GATED_WIDTH} is {folder.config.get(GATED_WIDTH)}: the shared expert is weighted by a sigmoid"
            f" ({gate}); allowed in a model of moebench: 0, or a gate with weights of 0"
        )
    vocab_size = read_tokenizer(folder).text.vocab_size
    if vocab_size > decoder.vocab_size:
        raise UsageError(
            f"{folder.path / CONFIG}: vocab_size is {decoder.vocab_size}, and the tokenizer has {vocab_size} ids, with"
            " one for the end of a document; add such a token to the tokenizer, and a row to the embedding"
        )
    model = {key: getattr(decoder.model, key) for key in MODEL_KEYS}
    settings = {"model": model, **decoder.to_settings(), "task": {"data": {"tokenizer": name_tokenizer(folder)}}}
    weights = ParentWeights(folder.tensors, maps, vocab_size)
    routing = None if decoder.experts is None else decoder.experts.routing
    return ParentModel(folder=folder, settings=settings, weights=weights, vocab_size=vocab_size, routing=routing)


def _read_own(folder: PretrainedFolder, file: str) -> ParentModel:
    """Return a model that moebench wrote with its own names of weights: any router, any layout."""
    cell = folder.config.get(CELL)
    if not isinstance(cell, dict) or not all(isinstance(cell.get(section), dict) for section in OWN_SECTIONS):
        raise UsageError(
            f"{file}: has no {CELL} with the sections {', '.join(OWN_SECTIONS)}, as `moebench export` writes"
        )
    settings = {section: cell[section] for section in OWN_SECTIONS}
    if (folder.path / TOKENIZER).exists():
        settings["task"] = {"data": {"tokenizer": name_tokenizer(folder)}}
    maps = {name: map_one(name, (name, tensor.shape)) for name, tensor in folder.tensors.items()}
    weights = ParentWeights(folder.tensors, maps, vocab_size=None)
    return ParentModel(folder=folder, settings=settings, weights=weights, vocab_size=folder.vocab_size, cell=cell)


def _read_keys(folder: PretrainedFolder, file: str) -> ConfigKeys:
    """Return the keys of config.json with the defaults of transformers."""
    with quiet_library():
        config = build_config(folder)
    aliases = {name: getattr(config, name, None) for name in getattr(config, "attribute_map", {})}
    keys = ConfigKeys({**aliases, **config.to_dict()}, file)
    kinds = set(keys.values.get("layer_types") or ()) - {"full_attention"}
    if kinds:
        raise keys.refuse("layer_types", "full_attention in all layers")
    return keys


def _require_weights(
    folder: PretrainedFolder, maps: Mapping[str, WeightMap], ignored: set[str], decoder: Decoder
) -> None:
    """Raise UsageError unless the stored tensors are exactly the mapped ones, with their shapes."""
    expected: dict[str, tuple[int, ...]] = {}
    missing: list[str] = []
    for weight in maps.values():
        fused = _find_stored(weight.fused.names, folder.tensors) if weight.fused else None
        if weight.fused and fused:
            expected[fused] = weight.fused.shape
            continue
        for part in weight.parts():
            name = _find_stored(part.names, folder.tensors)
            if name is None:
                missing.append(part.name)
            else:
                expected[name] = part.shape
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UsageError(f"{folder.path}: lacks the weight {missing[0]}{more}")
    for name, shape in expected.items():
        if folder.tensors[name].shape != shape:
            given = folder.tensors[name].shape
            raise UsageError(f"{folder.path}: the weight {name} has the shape {given}, and {CONFIG} gives {shape}")
    unused = [name for name in folder.tensors if name not in expected and name not in ignored]
    unused = [name for name in unused if not _has_no_effect(name, decoder)]
    if unused:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        raise UsageError(
            f"{folder.path}: has the weight {unused[0]}{more}, which {folder.family.title} has not with this {CONFIG}"
        )


def _has_no_effect(name: str, decoder: Decoder) -> bool:
    """Return whether a tensor is computed anyway, the tied head once more, or of layers after the last one."""
    if name.endswith(UNUSED_ENDINGS) or (decoder.model.tie_embeddings and name == "lm_head.weight"):
        return True
    layer = name.removeprefix("model.layers.").partition(".")[0]
    return name.startswith("model.layers.") and layer.isdecimal() and int(layer) >= decoder.model.num_layers


def _find_stored(names: tuple[str, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
    return next((name for name in names if name in tensors), None)
