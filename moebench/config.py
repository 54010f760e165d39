"""Read configurations from YAML files and overrides, and compute the ids of cells."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from moebench.conversion import NULL, apply_values, key_of, require_readable
from moebench.errors import UsageError
from moebench.init_config import InitConfig
from moebench.registry import get_registry
from moebench.schema import COMPONENTS, DEFAULT_NAMES, SECTIONS, CellConfig, ExperimentConfig
from moebench.stage_config import StageConfig, split_stage_key
from moebench.tuning_config import TuneConfig
from moebench.yaml_text import MAX_CHARACTERS, parse_override, parse_yaml

SCHEMA = 5
"""Part of every cell id: raised when a change makes older results incomparable."""

NOT_IN_ID = {
    "train": (
        *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints", "device", "max_epochs", "recompute"),
    ),
    "task": (),
    "layout": ("recompute",),
    "parallel": (
        *("devices", "nodes", "timeout_s", "stall_timeout_s", "check_every", "overlap"),
        *("shard_optimizer", "async_checkpoints"),
    ),
}
"""Keys that do not change a result, by section; a task adds others (paths) in `Config.NOT_IN_ID`."""

SPIKE_KEYS = ("spike_policy", "spike_window", "spike_threshold")
"""Keys of `train` that change a result only where the policy is another than to record spikes."""


def load_experiment(path: Path, overrides: Sequence[str] = ()) -> tuple[ExperimentConfig, dict[str, Any]]:
    """Return the experiment of a file and the overrides that belong to its cells (`router.top_k=4`)."""
    return apply_overrides(apply_values(ExperimentConfig(), read_yaml(path)), overrides)


def apply_overrides(experiment: ExperimentConfig, overrides: Sequence[str]) -> tuple[ExperimentConfig, dict[str, Any]]:
    """Apply the overrides of the experiment itself (grid, seeds, baseline, question); return it and the other ones.

    The others are still untyped: the type of a key depends on the component that it belongs to.
    """
    experiment_keys = {entry.name for entry in dataclasses.fields(ExperimentConfig)} - {"base"}
    experiment_values: dict[str, Any] = {}
    cell_values: dict[str, Any] = {}
    stage_values: list[tuple[str, Any]] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            raise UsageError(f"'{override}' is not of the form key=value (for example train.steps=500)")
        head, _, rest = key.partition(".")
        value = parse_override(text)
        if head == "stages" and rest:
            stage_values.append((rest, value))
        elif head in experiment_keys:
            experiment_values = _merge_overrides(experiment_values, _nest_experiment_value(head, rest, value))
        else:
            cell_values = _merge_overrides(cell_values, nest(key.removeprefix("base."), value))
    if experiment_values.get("tune", "") in NULL[:-1]:
        experiment = dataclasses.replace(experiment, tune=TuneConfig())
        del experiment_values["tune"]
    experiment = apply_values(experiment, experiment_values)
    for path, value in stage_values:
        experiment = dataclasses.replace(experiment, stages=_override_stage(experiment.stages, path, value))
    return experiment, cell_values


def _override_stage(stages: Sequence[StageConfig], path: str, value: Any) -> list[StageConfig]:
    """Return the stages with the value of `NAME.base.KEY` or `NAME.grid.KEY` set."""
    name, section, key = split_stage_key(path, stages)
    changed = []
    for stage in stages:
        if stage.name == name and section == "base":
            stage = dataclasses.replace(stage, base=merge_settings(stage.base, nest(key, value)))
        elif stage.name == name:
            stage = apply_values(stage, {"grid": {key: value}}, f"stages.{name}")
        changed.append(stage)
    return changed


def _nest_experiment_value(head: str, rest: str, value: Any) -> dict[str, Any]:
    """Return the value of an experiment's key below it: `grid.train.steps` and `tune.grid.train.steps` have dots."""
    if head == "tune" and rest:
        option, _, key = rest.partition(".")
        return {head: {option: {key: value} if key else value}}
    return {head: {rest: value} if rest else value}


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping of a YAML file with untyped scalars; raise UsageError if it cannot be read or is none."""
    try:
        with path.open(encoding="utf-8") as file:
            loaded = parse_yaml(file.read(MAX_CHARACTERS + 1), path.name)  # not all of a file without an end
    except FileNotFoundError as error:
        raise UsageError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path}: is a folder, not an experiment file") from error
    except (yaml.YAMLError, ValueError, OSError) as error:
        raise UsageError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, dict) or not loaded:
        raise UsageError(f"{path}: must be a mapping with keys such as base, grid and seeds")
    return loaded


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return nested mappings that have `value` at a dotted key."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def merge_settings(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two untyped cell mappings, where `upper` wins; a component whose `name` changes drops its lower options.

    Otherwise the options of one router would be unknown keys of another one.
    """
    merged = dict(lower)
    for key, value in upper.items():
        current = merged.get(key)
        if isinstance(value, str) and key in COMPONENTS:
            value = {"name": value}
        if isinstance(value, Mapping) and isinstance(current, Mapping):
            renamed = key in COMPONENTS and "name" in value and value["name"] != current.get("name")
            merged[key] = dict(value) if renamed else merge_settings(current, value)
        else:
            merged[key] = value
    return merged


def resolve(raw: Mapping[str, Any]) -> CellConfig:
    """Return the CellConfig of an untyped mapping; raise UsageError for unknown keys and invalid values."""
    sections: dict[str, Any] = {}
    for section in SECTIONS:
        if not isinstance(raw.get(section, {}), Mapping):
            raise UsageError(f"{section}: must be a mapping of keys to values, got {raw[section] or None!r}")
    for kind in COMPONENTS:
        given = raw.get(kind)
        if not isinstance(raw.get(kind, ""), Mapping | str):
            raise UsageError(f"{kind}: must be a name or a mapping with a name, got {given or None!r}")
        name = given if isinstance(given, str) else (given or {}).get("name", DEFAULT_NAMES[kind])
        sections[kind] = _defaults(kind, str(name))
    expanded = {
        key: {"name": value} if key in COMPONENTS and isinstance(value, str) else value for key, value in raw.items()
    }
    return apply_values(CellConfig(**sections), expanded)


def component_keys(kind: str, name: str) -> set[str]:
    """Return the keys of the Config of a component."""
    return {entry.name for entry in dataclasses.fields(get_registry(kind).get(name, where=f"{kind}.name").item.Config)}


def to_plain(config: Any) -> dict[str, Any]:
    """Return a configuration as dictionaries, lists and scalars, ready for JSON and YAML."""
    return {key_of(entry.name): _plain_value(getattr(config, entry.name)) for entry in dataclasses.fields(config)}


def _plain_value(value: Any) -> Any:
    # `dataclasses.asdict` copies scalars by `deepcopy`, which is most of the time of a grid of thousands of cells.
    if dataclasses.is_dataclass(value):
        return to_plain(value)
    if isinstance(value, list | tuple):
        return type(value)(_plain_value(item) for item in value)
    if isinstance(value, dict):
        return {key: _plain_value(item) for key, item in value.items()}
    return value


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a plain configuration with dots, such as `router.name`, and their values."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_yaml(config: Any) -> str:
    """Return a configuration as YAML."""
    return format_yaml(to_plain(config))


def format_yaml(plain: Mapping[str, Any]) -> str:
    """Return plain values as YAML, ending in a newline."""
    text: str = yaml.dump(dict(plain), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    return text


class _Dumper(yaml.SafeDumper):
    """A dumper that escapes characters which YAML would interpret as line breaks."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"'
    ),
)


def cell_id(config: CellConfig, data_digest: str, plugin_digests: Sequence[str] = ()) -> str:
    """Return the id of a cell, 12 hexadecimal digits: a hash of everything that determines its numbers.

    It covers the content of data and plugin files, but not paths, cadences of logging or names of arms.
    """
    plain = to_plain(config)
    for section, keys in NOT_IN_ID.items():
        for key in (*keys, *getattr(getattr(config, section), "NOT_IN_ID", ())):
            _drop(plain[section], key.split("."))
    for key in getattr(config.task, "NOT_IN_ID_IF_NULL", ()):
        if getattr(config.task, key) is None:
            _drop(plain["task"], [key])
    for key in config.train.list_unused_keys():
        _drop(plain["train"], [key])
    for section in plain:
        for key in getattr(getattr(config, section), "LEFT_OUT_AT_DEFAULT", ()):
            _drop_default(plain[section], getattr(config, section), key)
    if config.train.spike_policy == "record":
        for key in SPIKE_KEYS:
            _drop(plain["train"], [key])
    elif config.train.spike_policy == "rewind":  # to a checkpoint
        plain["train"]["checkpoint_every"] = config.train.checkpoint_every
    del plain["init"]["allow_overlap"]  # no number depends on it
    if dataclasses.replace(config.init, allow_overlap=False) == InitConfig():
        del plain["init"]  # so that cells without a parent keep the ids that they had before there were parents
    else:
        plain["init"]["from"] = [parent.name_in_id for parent in config.init.parents]
    content = {"schema": SCHEMA, "config": plain, "data": data_digest, "plugins": sorted(plugin_digests)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _drop(plain: dict[str, Any], path: list[str]) -> None:
    for key in path[:-1]:
        plain = plain.get(key) or {}
    plain.pop(path[-1], None)


def _drop_default(plain: dict[str, Any], section: Any, key: str) -> None:
    entry = {entry.name: entry for entry in dataclasses.fields(section)}[key]
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    if getattr(section, key) == default:
        _drop(plain, [key])


def _defaults(kind: str, name: str) -> Any:
    entry = get_registry(kind).get(name, where=f"{kind}.name")
    config_class = entry.item.Config
    try:
        require_readable(config_class)
        return config_class()
    except (UsageError, NameError, TypeError) as error:
        raise UsageError(f"{kind} '{name}' ({entry.origin}): Config: {error}") from error


def _merge_overrides(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Merge two overrides, where the later one wins; a component given by name keeps its name as a key."""
    merged = dict(lower)
    for key, value in upper.items():
        current = merged.get(key)
        if isinstance(value, Mapping) and isinstance(current, str) and key in COMPONENTS:
            current = {"name": current}
        if isinstance(value, Mapping) and isinstance(current, Mapping):
            merged[key] = _merge_overrides(current, value)
        else:
            merged[key] = value
    return merged
