"""The stages of an experiment file: the settings of each, and the overrides that reach it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moebench.config import flatten, merge_settings
from moebench.errors import UsageError, require
from moebench.experiment.axes import ARM
from moebench.schema import COMPONENTS, MAX_CELLS, ExperimentConfig
from moebench.stage_config import StageConfig
from moebench.tuning_config import TuneConfig


@dataclass(frozen=True, kw_only=True)
class StagePart:
    """One stage as an experiment of its own; an experiment without stages is one without a name."""

    name: str
    config: ExperimentConfig
    overrides: Mapping[str, Any]
    """The overrides of cells that reach the stage."""


def split_stages(config: ExperimentConfig, overrides: Mapping[str, Any]) -> tuple[list[StagePart], tuple[str, ...]]:
    """Return the stages in their order, and a note for each override that does not reach all of them.

    An earlier stage has the seeds of tuning too, which concerns the last one. Raises UsageError for an override that
    reaches no stage.
    """
    if not config.stages:
        return [StagePart(name="", config=config, overrides=overrides)], ()
    require(isinstance(config.base, Mapping), "base", str(config.base) or "null", "a mapping of keys to values")
    parts, skipping = [], dict[str, list[str]]()
    for number, stage in enumerate(config.stages):
        reaching, skipped = select_overrides(overrides, stage)
        for key in skipped:
            skipping.setdefault(key, []).append(stage.name)
        is_last = number == len(config.stages) - 1
        previous = {"init": {"from": f"stage:{config.stages[number - 1].name}"}} if number else {}
        part = replace(
            config,
            base=merge_settings(merge_settings(previous, config.base), stage.base),
            grid={**config.grid, **stage.grid},
            seeds=config.seeds if is_last or not config.tune.grid else [*config.seeds, *config.tune.seeds],
            tune=config.tune if is_last else TuneConfig(),
            baseline=config.baseline if is_last else None,
            stages=[],
        )
        parts.append(StagePart(name=stage.name, config=part, overrides=reaching))
    num_cells = sum(count_cells(part.config) for part in parts)
    require(num_cells <= MAX_CELLS, "cells of all stages", num_cells, f"at most {MAX_CELLS}")
    return parts, tuple(_note_skipped(skipping, [stage.name for stage in config.stages]))


def count_cells(config: ExperimentConfig) -> int:
    """Return the number of combinations of a grid and the seeds."""
    number = len(config.seeds)
    for values in config.grid.values():
        number *= len(values)
    return number


def _note_skipped(skipping: Mapping[str, Sequence[str]], stages: Sequence[str]) -> Iterator[str]:
    for key, names in skipping.items():
        alternatives = ", ".join(f"stages.{name}.base.{key}=..." for name in names)
        if len(names) == len(stages):
            raise UsageError(f"{key}: every stage sets it, so the override reaches none; choose with {alternatives}")
        yield f"{key} is not changed in stage {', '.join(names)}, which sets it: {alternatives}"


def select_overrides(overrides: Mapping[str, Any], stage: StageConfig) -> tuple[dict[str, Any], list[str]]:
    """Return the overrides of cells that a stage does not set itself, and the keys of the others."""
    keys_set = {key for key, _ in flatten(_name_components(stage.base))}
    for axis, values in stage.grid.items():
        entries = [value for value in values if isinstance(value, Mapping)] if axis == ARM else []
        axes = {part for entry in entries for part in entry if part != "label"} if axis == ARM else {axis}
        keys_set |= {f"{part}.name" if part in COMPONENTS else part for part in axes}
    skipped: list[str] = []
    return _select(_name_components(overrides), keys_set, "", skipped), skipped


def _name_components(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: {"name": value} if key in COMPONENTS and isinstance(value, str) else value for key, value in values.items()
    }


def _select(values: Mapping[str, Any], keys_set: set[str], prefix: str, skipped: list[str]) -> dict[str, Any]:
    selected: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        has_set_below = any(other.startswith(f"{path}.") for other in keys_set)
        if path in keys_set or (has_set_below and not isinstance(value, Mapping)):
            skipped.append(path)
        elif has_set_below:
            below = _select(value, keys_set, f"{path}.", skipped)
            selected |= {key: below} if below else {}
        else:
            selected[key] = value
    return selected
