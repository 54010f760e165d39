"""Named sizes: model, tokens, batch and learning rate of a training budget, merged into an experiment.

The sizes S0 to S3 of the package are derived from a budget C of training FLOPs of the dense arm, which is three times
its forward FLOPs per token times the tokens: about 20 tokens per active parameter (Hoffmann et al., arXiv:2203.15556),
with batches of 0.292 C^0.327 tokens and a learning rate of 0.312 C^-0.125 (DeepSeek LLM, arXiv:2401.02954, equation 1),
both rounded.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from moebench.config import component_keys, merge_settings, read_yaml
from moebench.conversion import Untyped, apply_values
from moebench.errors import UsageError, unknown
from moebench.experiment.axes import component_name
from moebench.experiment.files import list_sizes
from moebench.ranges import POSITIVE_FINITE, Range, at_least_1_up_to, check_ranges
from moebench.schema import ExperimentConfig

SECTIONS = ("model", "train", "task")
"""Sections that a size may set: routers and layouts are what an experiment compares."""


@dataclass(frozen=True, kw_only=True)
class SizeConfig:
    """A size file: a budget, and the keys of a cell that spend it."""

    RANGES: ClassVar[Mapping[str, Range]] = {"flops": POSITIVE_FINITE, "vocab_size": at_least_1_up_to(2**24)}

    about: str = ""
    """What the size is for, in one sentence."""
    flops: float = 1e14
    """Training FLOPs of the dense arm."""
    vocab_size: int = 4096
    """Tokens of the vocabulary that `flops` is counted with."""
    base: Untyped = field(default_factory=dict)
    """Keys of a cell."""

    def __post_init__(self) -> None:
        check_ranges(self, "size")
        if not isinstance(self.base, Mapping) or not all(isinstance(part, Mapping) for part in self.base.values()):
            raise UsageError("base: must be a mapping of sections to keys and values")
        for section in self.base:
            if section not in SECTIONS:
                raise UsageError(f"base.{section}: a size does not set it (allowed: {', '.join(SECTIONS)})")
        if "name" in self.base.get("task", {}):
            raise UsageError("base.task.name: a size does not set it; the experiment names its task")


def read_size(name: str) -> SizeConfig:
    """Return a size; raise UsageError for an unknown one and for a mistake in its file."""
    files = list_sizes()
    if name not in files:
        raise unknown("size", name, files)
    values = read_yaml(files[name])
    try:
        return apply_values(SizeConfig(), values)
    except UsageError as error:
        raise UsageError(f"{files[name]}: {error}") from error


def apply_size(config: ExperimentConfig, own_size: str | None) -> ExperimentConfig:
    """Return the experiment with the keys of its size in `base`.

    The size that its own file names, `own_size`, is below the keys of `base`; another one, which was chosen for this
    call, is above them.
    """
    if config.size is None or not isinstance(config.base, Mapping):
        return config
    base = merge_settings({}, config.base)
    preset = merge_settings({}, read_size(config.size).base)
    task = component_name(base, "task")
    for option in preset.get("task", {}):
        if option not in component_keys("task", task):
            raise UsageError(f"size: {config.size} sets task.{option}, which '{task}' lacks: it is a size of text")
    preset["task"] = {"name": task, **preset.get("task", {})}
    layers: tuple[Any, Any] = (preset, base) if config.size == own_size else (base, preset)
    return replace(config, base=merge_settings(*layers))


def name_experiment(stem: str, size: str | None, own_size: str | None) -> str:
    """Return the name of an experiment: with the size, where it is not that of the experiment's own file."""
    return stem if size in (None, own_size) else f"{stem}-{size}"
