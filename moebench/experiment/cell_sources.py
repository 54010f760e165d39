"""Where a cell's initial weights come from: runs of earlier stages, which become runs with an id."""

from collections.abc import Sequence
from dataclasses import replace

from moebench.schema import CellConfig
from moebench.stage_config import PREFIX

RUN_PREFIX = "run:"
"""Of a source that is a run."""


def list_sources(config: CellConfig) -> list[str]:
    """Return the sources of the initial weights of a cell, in their order."""
    source = config.init.from_
    if source is None:
        return []
    return [source] if isinstance(source, str) else list(source)


def list_stage_sources(config: CellConfig) -> list[str]:
    """Return the sources that are runs of an earlier stage: NAME or NAME/LABEL."""
    return [source.removeprefix(PREFIX) for source in list_sources(config) if source.startswith(PREFIX)]


def replace_sources(config: CellConfig, sources: Sequence[str]) -> CellConfig:
    """Return a cell with other sources of its initial weights: a single one as text."""
    return replace(config, init=replace(config.init, from_=sources[0] if len(sources) == 1 else list(sources)))
