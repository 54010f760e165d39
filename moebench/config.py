"""The configuration: typed schema, YAML files, overrides, errors that name the key. The only importer of omegaconf."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from moebench.errors import UsageError, nearest
from moebench.registry import registry_of

SCHEMA = 1
"""Part of every cell's id: raised when a change makes old results incomparable."""

COMPONENTS = ("task", "layout", "router")
"""The sections of a cell that a `name` picks from a registry."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer around the experts."""

    d_model: int = 128
    """Width of the residual stream."""
    num_layers: int = 4
    """Transformer blocks."""
    num_heads: int = 4
    """Attention heads; d_model / num_heads must be even."""
    ffn_width: int = 512
    """Hidden width that one token uses: of the dense network, and of its active experts together."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Of dense networks and experts alike."""
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""

    def __post_init__(self) -> None:
        """Refuse sizes that make no model."""
        for key in ("d_model", "num_layers", "num_heads", "ffn_width"):
            require(getattr(self, key) >= 1, f"model.{key}", getattr(self, key), "at least 1")
        fits = self.d_model % self.num_heads == 0 and self.d_model // self.num_heads % 2 == 0
        require(fits, "model.num_heads", self.num_heads, f"a divisor of d_model={self.d_model} with an even quotient")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How every arm is trained: the same for all of them."""

    steps: int = 300
    """Optimizer steps."""
    batch_size: int = 16
    """Sequences per step."""
    learning_rate: float = 3e-3
    """Peak of the schedule: linear warm-up, then a cosine down to final_rate of it."""
    warmup_steps: int = 20
    """Steps of the linear warm-up."""
    final_rate: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices only."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: float = 0.95
    """AdamW's decay of the squared gradient."""
    clip_norm: float = 1.0
    """Largest norm of the whole gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 is autocast; parameters, optimizer and routing stay fp32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a CUDA device where there is one."""
    threads: int = 1
    """CPU threads of one cell; part of the cell, because sums change with it in the last bit."""
    eval_every: int = 100
    """Steps between evaluations on the validation split."""
    log_every: int = 10
    """Steps between points in the journal."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for key in ("steps", "batch_size", "threads", "eval_every", "log_every", "checkpoint_every"):
            require(getattr(self, key) >= 1, f"train.{key}", getattr(self, key), "at least 1")
        for key in ("learning_rate", "clip_norm"):
            require(getattr(self, key) > 0, f"train.{key}", getattr(self, key), "greater than 0")
        for key in ("weight_decay", "warmup_steps"):
            require(getattr(self, key) >= 0, f"train.{key}", getattr(self, key), "at least 0")
        for key in ("beta1", "beta2"):
            require(0 <= getattr(self, key) < 1, f"train.{key}", getattr(self, key), "at least 0 and below 1")
        require(0 <= self.final_rate <= 1, "train.final_rate", self.final_rate, "between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class CellConfig:
    """One training run, complete: together with the data it decides every number."""

    task: Any
    """Data, input, head and metrics: the Config of a registered task."""
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: Any
    """Which blocks hold experts, and what they are: the Config of a registered layout."""
    router: Any
    """The routing algorithm: the Config of a registered router."""
    train: TrainConfig = field(default_factory=TrainConfig)
    seed: int = 0
    """Initial weights, data order and routing noise."""
    allow_noncausal: bool = False
    """Let a router that sees the future run on a causal task; every table marks the arm."""

    def __post_init__(self) -> None:
        """Refuse seeds that no generator takes."""
        require(0 <= self.seed < 2**31, "seed", self.seed, "at least 0 and below 2^31")


DEFAULT_NAMES = {"task": "language", "layout": "every_n", "router": "switch"}

NOT_IN_ID = {"train": ("log_every", "checkpoint_every", "device"), "task": ()}
"""Keys that do not change a result, by section; a task adds its own (paths) in `Config.NOT_IN_ID`."""


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """An experiment file: a question, a base configuration and a grid."""

    question: str = ""
    """What the experiment answers, in a sentence."""
    base: Any = field(default_factory=dict)
    """The keys of a cell that are the same everywhere."""
    grid: dict[str, list[Any]] = field(default_factory=dict)
    """Key -> values: one arm for each combination."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """One run of every arm for each seed; the same seed means the same data order and shared initial weights."""
    baseline: str | None = None
    """The arm that the others are compared with; null takes the first."""

    def __post_init__(self) -> None:
        """Refuse grids and seeds that make no cells."""
        require(len(self.seeds) > 0, "seeds", self.seeds, "at least one seed")
        require(len(set(self.seeds)) == len(self.seeds), "seeds", self.seeds, "each seed once")
        for key, values in self.grid.items():
            require(len(values) > 0, f"grid.{key}", values, "at least one value")


def require(condition: bool, key: str, given: object, allowed: str) -> None:
    """Raise UsageError naming the key, what was given and what is allowed, unless the condition holds."""
    if not condition:
        raise UsageError(f"{key} must be {allowed}, got {given}")


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> tuple[ExperimentConfig, dict[str, Any]]:
    """Read an experiment file; return it, and the overrides that belong to the cells (`router.top_k=4`)."""
    merged = _merge(ExperimentConfig(), read_yaml(path), str(path))
    return with_overrides(_to_object(merged, str(path)), overrides)


def with_overrides(experiment: ExperimentConfig, overrides: Sequence[str]) -> tuple[ExperimentConfig, dict[str, Any]]:
    """Apply the overrides that change the experiment itself (grid, seeds, baseline, question); return the rest."""
    own = {entry.name for entry in dataclasses.fields(ExperimentConfig)} - {"base"}
    experiment_level: list[str] = []
    cell_level: list[str] = []
    for override in overrides:
        key, separator, _ = override.partition("=")
        if not separator or not key:
            raise UsageError(f"'{override}' is not of the form key=value (for example train.steps=500)")
        (experiment_level if re.split(r"[.\[]", key)[0] in own else cell_level).append(override)
    merged = _merge(experiment, _dotlist(experiment_level), "command line")
    return _to_object(merged, "command line"), _plain(_dotlist([item.removeprefix("base.") for item in cell_level]))


def read_yaml(path: Path) -> DictConfig:
    """Read a YAML mapping; raise UsageError in one line for a missing, unreadable or malformed file."""
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, not an experiment file") from error
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"{path}: not readable as YAML: {_first_line(error)}") from error
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"{path}: must be a mapping of keys to values")
    return loaded


def layer_over(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two untyped cell mappings; a component whose `name` changes loses the lower options.

    Otherwise the options of one router would be unknown keys of the next.
    """
    merged = dict(lower)
    for key, value in upper.items():
        below = merged.get(key)
        if isinstance(value, str) and key in COMPONENTS:
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            renamed = key in COMPONENTS and "name" in value and value["name"] != below.get("name")
            merged[key] = dict(value) if renamed else layer_over(below, value)
        else:
            merged[key] = value
    return merged


def resolve(raw: Mapping[str, Any], where: str = "configuration") -> CellConfig:
    """Turn an untyped mapping into a CellConfig: defaults filled in, every key known, every type and range right."""
    sections: dict[str, Any] = {}
    for kind in COMPONENTS:
        given = raw.get(kind)
        if given is not None and not isinstance(given, Mapping | str):
            raise UsageError(f"{kind}: must be a name or a mapping with a name, got {given!r}")
        name = given if isinstance(given, str) else (given or {}).get("name", DEFAULT_NAMES[kind])
        sections[kind] = _defaults(kind, str(name))
    expanded = {
        key: {"name": value} if key in COMPONENTS and isinstance(value, str) else value for key, value in raw.items()
    }
    config: CellConfig = _to_object(_merge(CellConfig(**sections), OmegaConf.create(expanded), where), where)
    return config


def component_fields(kind: str, name: str) -> set[str]:
    """Return the keys that a component's Config has."""
    return {entry.name for entry in dataclasses.fields(registry_of(kind).get(name, where=f"{kind}.name").item.Config)}


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as plain dictionaries, lists and scalars, ready for JSON and YAML."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.create(to_plain(config)))


def cell_id(config: CellConfig, data_digest: str, plugin_digests: Sequence[str] = ()) -> str:
    """Return the 12 hexadecimal digits that name a cell: a hash of all that decides its numbers.

    Paths, log cadence and names of arms stay out; the content of the data and of plugin files goes in.
    """
    plain = to_plain(config)
    for section, keys in NOT_IN_ID.items():
        for key in (*keys, *getattr(getattr(config, section), "NOT_IN_ID", ())):
            _drop(plain[section], key.split("."))
    content = {"schema": SCHEMA, "config": plain, "data": data_digest, "plugins": sorted(plugin_digests)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _drop(plain: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        plain = plain.get(key) or {}
    plain.pop(path[-1], None)


def _defaults(kind: str, name: str) -> Any:
    return registry_of(kind).get(name, where=f"{kind}.name").item.Config()


def _dotlist(items: Sequence[str]) -> DictConfig:
    try:
        return OmegaConf.from_dotlist(list(items))
    except (YAMLError, OmegaConfBaseException) as error:
        raise UsageError(f"command line: {' '.join(items)}: {_first_line(error)}") from error


def _plain(node: DictConfig) -> dict[str, Any]:
    return OmegaConf.to_container(node)  # type: ignore[return-value]


def _merge(schema: Any, values: DictConfig, where: str) -> DictConfig:
    return _merge_node(OmegaConf.structured(schema), values, where)


def _merge_node(schema: DictConfig, values: DictConfig, where: str) -> DictConfig:
    try:
        return OmegaConf.merge(schema, values)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        _explain(error, schema, where)


def _to_object(node: DictConfig, where: str) -> Any:
    try:
        return OmegaConf.to_object(node)
    except OmegaConfBaseException as error:
        _explain(error, node, where)


def _explain(error: OmegaConfBaseException, schema: DictConfig, where: str) -> NoReturn:
    """Turn omegaconf's error into one line: the key, what was given, what is allowed, the nearest name."""
    key = getattr(error, "full_key", None) or ""
    if isinstance(error, ConfigKeyError):
        parent, _, leaf = key.rpartition(".")
        section = OmegaConf.select(schema, parent) if parent else schema
        allowed = [str(name) for name in section] if isinstance(section, DictConfig) else []
        name = section.get("name") if isinstance(section, DictConfig) and parent in COMPONENTS else None
        owner = f"{parent} '{name}'" if name else (parent or "the top level")
        raise UsageError(
            f"{key}: {owner} has no key '{leaf}'.{nearest(leaf, allowed)} Allowed: {', '.join(sorted(allowed))}"
        ) from error
    raise UsageError(f"{key + ': ' if key else where + ': '}{_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    if isinstance(error, YAMLError):
        return " ".join(str(error).split())
    return str(error).split("\n", maxsplit=1)[0]
