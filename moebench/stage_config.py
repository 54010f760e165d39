"""The schema of `stages` in an experiment file: runs that are trained one after another, each from an earlier one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moebench.conversion import Untyped
from moebench.errors import UsageError, build_unknown_error, require
from moebench.file_access import require_plain_name

RESERVED_NAMES = ("tuning",)
"""The runs of a stage are the experiment EXPERIMENT-STAGE, and those of tuning are EXPERIMENT-tuning."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of an experiment: what it changes of the experiment's `base`, and what it adds to its `grid`."""

    name: str
    """Name of the stage, for `init.from: stage:NAME`."""
    base: Untyped = field(default_factory=dict)
    """Keys of a cell; they override those of the experiment's `base`."""
    grid: dict[str, list[Untyped]] = field(default_factory=dict)
    """Key -> values, in addition to the experiment's `grid`; for a key in both, these values apply."""

    def __post_init__(self) -> None:
        require_plain_name(self.name, "stages: name of a stage")
        is_free = self.name not in RESERVED_NAMES and not set(self.name) & set(":/@= ")
        require(is_free, "stages: name of a stage", repr(self.name), "another name, without spaces and : / @ =")
        if not isinstance(self.base, Mapping):
            raise UsageError(f"stages.{self.name}.base: must be a mapping of keys to values, got {self.base!r}")
        for key, values in self.grid.items():
            require(len(values) > 0, f"stages.{self.name}.grid.{key}", values, "a list with at least one value")


def check_stages(stages: Sequence[StageConfig]) -> None:
    """Raise UsageError for a single stage, and for two of one name."""
    names = [stage.name for stage in stages]
    require(len(names) != 1, "stages", names, "none, or at least two")
    require(len(set(names)) == len(names), "stages", names, "names that occur once")


def split_stage_key(path: str, stages: Sequence[StageConfig]) -> tuple[str, str, str]:
    """Return the name, the section and the key of an override `stages.NAME.base.KEY` or `stages.NAME.grid.KEY`.

    Raises UsageError for another path, and for a stage that is not there.
    """
    name, _, rest = path.partition(".")
    section, _, key = rest.partition(".")
    if section not in ("base", "grid") or not key:
        allowed = "stages.NAME.base.KEY=VALUE, stages.NAME.grid.KEY=[...]"
        raise UsageError(f"stages.{path}: is no key of a stage (allowed: {allowed})")
    if name not in (names := [stage.name for stage in stages]):
        raise build_unknown_error("stages: stage", name, names)
    return name, section, key
