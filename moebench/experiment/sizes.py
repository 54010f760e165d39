"""Named sizes: model, tokens, batch and learning rate of a training budget, merged into an experiment.

The sizes S0 to S3 of the package are derived from a budget C of training FLOPs of the dense arm, which is three times
its forward FLOPs per token times the tokens: about 20 tokens per active parameter (Hoffmann et al., arXiv:2203.15556),
with batches of 0.292 C^0.327 tokens and a learning rate of 0.312 C^-0.125 (DeepSeek LLM, arXiv:2401.02954, equation 1),
both rounded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from moebench.config import NOT_IN_ID, component_keys, merge_settings, read_yaml
from moebench.conversion import Untyped, apply_values
from moebench.errors import UsageError, build_unknown_error
from moebench.experiment.axes import component_name
from moebench.experiment.files import list_sizes
from moebench.ranges import POSITIVE_FINITE, Range, at_least_1_up_to, check_ranges
from moebench.schema import ExperimentConfig, ModelConfig, TrainConfig

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
    """Vocabulary size that `flops` is counted with."""
    tasks: list[str] = field(default_factory=list)
    """Tasks that the size is made for; others are refused. Empty: every task that has the options it sets."""
    base: Untyped = field(default_factory=dict)
    """Keys of a cell."""

    def __post_init__(self) -> None:
        check_ranges(self, "size")
        if not isinstance(self.base, Mapping) or not all(isinstance(part, Mapping) for part in self.base.values()):
            raise UsageError("base: must be a mapping of sections to keys and values")
        for section in self.base:
            if section not in SECTIONS:
                raise UsageError(f"base.{section}: a size does not set it (allowed: {', '.join(SECTIONS)})")
        for section, options in (("model", fields(ModelConfig)), ("train", fields(TrainConfig))):
            known = [option.name for option in options]
            for key in self.base.get(section, {}):
                if key not in known:
                    raise build_unknown_error(f"base.{section}", key, known)
        if "name" in self.base.get("task", {}):
            raise UsageError("base.task.name: a size does not set it; the experiment names its task")


def read_size(name: str) -> SizeConfig:
    """Return a size; raise UsageError for an unknown one and for a mistake in its file."""
    files = list_sizes()
    if name not in files:
        raise build_unknown_error("size", name, files)
    values = read_yaml(files[name])
    try:
        return apply_values(SizeConfig(), values)
    except UsageError as error:
        raise UsageError(f"{files[name]}: {error}") from error


def apply_size(config: ExperimentConfig, own_size: str | None, overrides: Mapping[str, Any]) -> ExperimentConfig:
    """Return the experiment with the keys of its size in `base`.

    The size that its own file names, `own_size`, is below the keys of `base`; another one, which was chosen for this
    call, takes the place of model and training in it. `overrides`: of cells; where they name another task, the size's
    options are those of that task.
    """
    if config.size is None or not isinstance(config.base, Mapping):
        return config
    task_override = overrides.get("task", {})
    has_task = isinstance(task_override, str) or "name" in task_override
    base = merge_settings({}, config.base)
    task = component_name(overrides if has_task else base, "task")
    if has_task:
        base = merge_settings(base, {"task": {"name": task}})
    preset = merge_settings({}, _read_size_of(config.size, task).base)
    preset["task"] = {"name": task, **preset.get("task", {})}
    layers: tuple[Any, Any] = (preset, base) if config.size == own_size else (_drop_model_and_training(base), preset)
    return replace(config, base=merge_settings(*layers))


def _drop_model_and_training(base: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` without the keys of its model, and of its training without those that change results."""
    kept = {**base, "model": {}}
    if isinstance(base.get("train"), Mapping):
        kept["train"] = {key: value for key, value in base["train"].items() if key in NOT_IN_ID["train"]}
    return kept


def check_size(name: str | None, tasks: Sequence[str]) -> None:
    """Raise UsageError for a size that is not for the tasks of the arms, or whose options not all of them have."""
    if name is None:
        return
    for task in dict.fromkeys(tasks):
        size = _read_size_of(name, task)
        if task != tasks[0] and size.base.get("task"):
            options = ", ".join(f"task.{option}" for option in size.base["task"])
            raise UsageError(
                f"size: {name} sets {options} of one task, and the arms have several: {tasks[0]} and {task}; give each"
                " an experiment of its own"
            )


def _read_size_of(name: str, task: str) -> SizeConfig:
    """Return a size; raise UsageError for a task that it is not for."""
    size = read_size(name)
    if size.tasks and task not in size.tasks:
        raise UsageError(
            f"size: {name} is for the tasks {', '.join(size.tasks)}, and task.name is '{task}', which would get its"
            f" model, batch and learning rate; `moebench show {name}` prints a file that sizes/NAME.yaml can begin with"
        )
    for option in size.base.get("task", {}):
        if option not in component_keys("task", task):
            raise UsageError(f"size: {name} sets task.{option}, which '{task}' lacks")
    return size


def name_experiment(stem: str, size: str | None, own_size: str | None) -> str:
    """Return the name of an experiment: with the size, where it is not that of the experiment's own file."""
    return stem if size in (None, own_size) else f"{stem}-{size}"
