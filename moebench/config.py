"""Reading configurations: YAML files, overrides, errors that name the key. The only importer of omegaconf."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from moebench.errors import UsageError, nearest
from moebench.registry import registry_of
from moebench.schema import COMPONENTS, DEFAULT_NAMES, SECTIONS, CellConfig, ExperimentConfig

SCHEMA = 2
"""Part of every cell's id: raised when a change makes old results incomparable."""

NOT_IN_ID = {
    "train": ("log_every", "eval_every", "checkpoint_every", "device"),
    "task": (),
    "layout": ("recompute",),
    "parallel": ("devices", "nodes", "timeout_s", "check_every", "overlap"),
}
"""Keys that do not change a result, by section; a task adds its own (paths) in `Config.NOT_IN_ID`."""


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
        if not separator or not all(key.split(".")):
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
    if not isinstance(loaded, DictConfig) or not loaded:
        raise UsageError(f"{path}: must be a mapping with keys such as base, grid and seeds")
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
    for section in SECTIONS:
        if not isinstance(raw.get(section, {}), Mapping):
            raise UsageError(f"{section}: must be a mapping of keys to values, got {raw[section]!r}")
    for kind in COMPONENTS:
        given = raw.get(kind)
        if not isinstance(raw.get(kind, ""), Mapping | str):
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
