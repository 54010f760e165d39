"""A folder that `save_pretrained` of transformers wrote, checked without loading a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moebench.errors import UsageError
from moebench.file_access import parse_json, read_plain_file
from moebench.pretrained.families import CONFIG, OWN_FORMAT, Family, find_family, read_number
from moebench.pretrained.library import require_libraries
from moebench.pretrained.weights import StoredTensor, read_weights

PREFIX = "hf:"
"""Begins the name of such a folder on the command line and in experiments."""
ADAPTER = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 2**20
NOT_READ = ("auto_map", "fusion_config", "transformers_weights", "distributed_config", "name_or_path")
"""Keys that name code or files, or replace modules: the weights are read without them."""
REFUSED = ("quantization_config", "per_layer_config")
"""Keys that change what the weights mean."""


@dataclass(frozen=True, kw_only=True)
class PretrainedFolder:
    """A local folder with a configuration and weights that belong together."""

    path: Path
    family: Family
    config: Mapping[str, Any]
    """The content of config.json, without keys that transformers may follow elsewhere."""
    tensors: Mapping[str, StoredTensor]
    """Name of each weight -> where it is stored."""

    @cached_property
    def num_parameters(self) -> int:
        """Number of stored values."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return read_number(self.config, "vocab_size")

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer; 0 in a dense model."""
        return read_number(self.config, *self.family.num_experts) if self.family.num_experts else 0


def is_pretrained(name: str) -> bool:
    """Return whether a name on the command line is that of such a folder."""
    return name.startswith(PREFIX)


def open_pretrained(name: str, *, requires_experts: bool = True) -> PretrainedFolder:
    """Return the checked folder that `hf:PATH` names.

    Raises UsageError for what is no local folder, for an unknown architecture, with `requires_experts` for one without
    experts, for pickled, quantised or missing weights, for numbers of layers and experts that the weights cannot have,
    and where the extra `hf` is not installed.
    """
    require_libraries()
    path = Path(name.removeprefix(PREFIX)).expanduser()
    try:
        is_folder = path.is_dir()
    except (OSError, ValueError):
        is_folder = False
    if not is_folder or name == PREFIX:
        raise UsageError(f"{name}: is no local folder; nothing is downloaded (allowed: {PREFIX}PATH of a folder)")
    if (path / ADAPTER).exists():
        raise UsageError(f"{path}: has {ADAPTER}: an adapter, not a whole model; merge it into its model first")
    config = _read_config(path / CONFIG)
    family = find_family(config, str(path / CONFIG), requires_experts=requires_experts)
    refused = next((key for key in REFUSED if config.get(key)), None)
    if refused:
        raise UsageError(f"{path / CONFIG}: has {refused}; allowed: weights in fp32, bf16 or fp16, all layers alike")
    tensors = read_weights(path, allows_integers=family.model_type == OWN_FORMAT)
    folder = PretrainedFolder(path=path, family=family, config=_drop_keys(config), tensors=tensors)
    _require_plausible(folder)
    return folder


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = parse_json(read_plain_file(file, MAX_CONFIG_BYTES))
    except FileNotFoundError as error:
        raise UsageError(f"{file}: does not exist; a folder of save_pretrained has it") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file}: is no JSON file ({error})") from error
    if not isinstance(config, dict):
        raise UsageError(f"{file}: is a {type(config).__name__}; allowed: a JSON object with a model_type")
    return config


def _drop_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration without keys that choose code: implementations may be fetched from the hub."""
    return {
        key: value
        for key, value in config.items()
        if key not in NOT_READ and not key.startswith("_") and "implementation" not in key
    }


def _require_plausible(folder: PretrainedFolder) -> None:
    """Raise UsageError for numbers of modules that no file of this many tensors has: building them has no end."""
    config, file = folder.config, folder.path / CONFIG
    try:
        layers = {key: read_number(config, key) for key in folder.family.num_layers if config.get(key) is not None}
        experts = dict.fromkeys(folder.family.num_experts[:1], folder.num_experts)
        counts = {**layers, **experts, "vocab_size": folder.vocab_size}
    except ValueError as error:
        raise UsageError(f"{file}: {error}") from error
    limits = dict.fromkeys(layers, len(folder.tensors)) | {"vocab_size": folder.num_parameters}
    for key, value in counts.items():
        limit = limits.get(key, folder.num_parameters)
        if not 1 <= value <= limit:
            raise UsageError(f"{file}: {key} is {value}, which {len(folder.tensors)} tensors cannot have")
