"""The trials of equal tuning: every arm tries every combination of the same values that mean something to it.

An arm for which a key means nothing (a dense model has no coefficient of a balance loss) has fewer trials; `tune.extra`
gives it further values of the other keys until it has as many as the largest arm.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

from moebench.compatibility import check_cell
from moebench.config import nest, to_plain
from moebench.conversion import apply_values
from moebench.errors import UsageError, require, suggest
from moebench.experiment.arms import Arm
from moebench.experiment.axes import is_unused_by
from moebench.runs.cell import Cell
from moebench.schema import MAX_CELLS, CellConfig, ExperimentConfig
from moebench.tuning_config import TuneConfig

SECTIONS = ("train", "router", "layout", "balance")
"""Sections whose keys can be tuned: those of the model and the task define what is compared."""
FIXED = ("train.steps", "train.batch_size")
"""Every arm of a comparison trains on the same tokens."""
BuildCell = Callable[[Arm, int], Cell]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One combination of values that an arm tries."""

    label: str
    settings: Mapping[str, Any]
    """Key of a cell -> value."""
    cells: tuple[Cell, ...]
    """The tuning runs, one for each tuning seed."""
    final_cells: tuple[Cell, ...]
    """The runs of the arm that are reported if it chooses this trial."""


@dataclass(frozen=True, kw_only=True)
class ArmTuning:
    """The trials of one arm, in the order of the grid."""

    arm: str
    trials: tuple[Trial, ...]

    def is_edge(self, trial: Trial, key: str) -> bool:
        """Return whether a trial's value of a key is the smallest or largest of several numbers that the arm tries."""
        values = {other.settings[key] for other in self.trials if key in other.settings}
        numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
        return 1 < len(numbers) == len(values) and trial.settings[key] in (min(numbers), max(numbers))

    def list_edges(self, trial: Trial) -> tuple[str, ...]:
        """Return the keys whose value in a trial is the smallest or largest that was tried."""
        return tuple(key for key in trial.settings if self.is_edge(trial, key))


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What the arms of an experiment try, and with which seeds."""

    arms: tuple[ArmTuning, ...]
    seeds: tuple[int, ...]
    keys: tuple[str, ...]
    steps: int | None
    """Updates of a tuning run; None: as many as in the reported runs."""


def note_unequal_budgets(counts: Mapping[str, int]) -> list[str]:
    """Return a note if the arms do not have equally many trials; `counts`: trials by arm."""
    fewest, most = min(counts.values(), default=0), max(counts.values(), default=0)
    if fewest == most:
        return []
    arms = ", ".join(arm for arm, count in counts.items() if count < most)
    return [f"unequal budgets: {fewest} to {most} trials; fewer for {arms} (tune.extra gives them more)"]


def build_tuning(config: ExperimentConfig, arms: Sequence[Arm], build_cell: BuildCell) -> Tuning:
    """Build every trial of every arm; raise UsageError for a key that no arm has and a trial that cannot be trained."""
    tune = config.tune
    for key in tune.grid:
        _check_key(key, arms)
    values = {arm.label: {key: v for key, v in tune.grid.items() if has_key(arm.config, key)} for arm in arms}
    budget = max(math.prod(map(len, of_arm.values())) for of_arm in values.values())
    for of_arm in values.values():
        _add_extra_values(of_arm, tune.extra, budget)
    num_runs = sum(math.prod(map(len, of_arm.values())) for of_arm in values.values()) * len(tune.seeds)
    require(num_runs <= MAX_CELLS, "tune.grid times arms times tune.seeds", num_runs, f"at most {MAX_CELLS} cells")
    tuned = []
    for arm in arms:
        trials = tuple(
            _build_trial(arm, dict(zip(values[arm.label], combination, strict=True)), config, build_cell)
            for combination in itertools.product(*values[arm.label].values())
        )
        _refuse_equal_trials(arm.label, trials)
        tuned.append(ArmTuning(arm=arm.label, trials=trials))
    return Tuning(arms=tuple(tuned), seeds=tuple(tune.seeds), keys=tuple(tune.grid), steps=tune.steps)


def has_key(config: CellConfig, key: str) -> bool:
    """Return whether a key exists in a resolved cell and can change its result.

    A coefficient of a loss exists where the router has this loss.
    """
    return not is_unused_by(config.router.name, key) and _has_path(config, key.split("."))


def _has_path(value: Any, parts: Sequence[str]) -> bool:
    for part in parts:
        if is_dataclass(value) and part in {entry.name for entry in fields(value)}:
            value = getattr(value, part)
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
        else:
            return False
    return not is_dataclass(value)


def _check_key(key: str, arms: Sequence[Arm]) -> None:
    section, _, option = key.partition(".")
    if section not in SECTIONS or option in ("", "name"):
        raise UsageError(f"tune.grid.{key}: cannot be tuned (allowed: keys of {', '.join(SECTIONS)})")
    if key in FIXED:
        raise UsageError(f"tune.grid.{key}: cannot be tuned, because all arms train on the same tokens")
    if any(key in arm.varies for arm in arms):
        raise UsageError(f"tune.grid.{key}: the grid varies it (allowed: a key that is the same in all arms)")
    if not any(has_key(arm.config, key) for arm in arms):
        known = dict.fromkeys(name for arm in arms for name in _list_keys("", to_plain(arm.config)))
        known = {name: None for name in known if name.split(".")[0] in SECTIONS}
        raise UsageError(f"tune.grid.{key}: no arm has this key.{suggest(key, known)}")


def _list_keys(prefix: str, value: Any) -> list[str]:
    if not isinstance(value, Mapping):
        return [prefix]
    return [key for part, item in value.items() for key in _list_keys(f"{prefix}.{part}" if prefix else part, item)]


def _add_extra_values(values: dict[str, list[Any]], extra: Mapping[str, Sequence[Any]], budget: int) -> None:
    """Add further values, key by key in turn, while the arm has no more trials than the budget."""
    for turn in itertools.zip_longest(*([(key, value) for value in extra[key]] for key in extra if key in values)):
        for key, value in filter(None, turn):
            longer = values | {key: [*values[key], value]}
            if math.prod(map(len, longer.values())) <= budget:
                values |= longer


def _build_trial(arm: Arm, raw: Mapping[str, Any], config: ExperimentConfig, build_cell: BuildCell) -> Trial:
    cell_config = arm.config
    for key, value in raw.items():
        try:
            cell_config = apply_values(cell_config, nest(key, value))
        except UsageError as error:
            raise UsageError(f"tune.grid: {error}") from error
    check_cell(cell_config)
    plain = to_plain(cell_config)
    settings = {key: _look_up(plain, key.split(".")) for key in raw}
    tuned = replace(arm, config=cell_config, varies={**arm.varies, **settings})
    label = ", ".join(f"{name}={settings[key]}" for key, name in shorten_keys(settings).items()) or "as in the file"
    short = replace(tuned, label=f"{arm.label}: {label}", config=_shorten_training(cell_config, config.tune))
    return Trial(
        label=label,
        settings=settings,
        cells=tuple(build_cell(short, seed) for seed in config.tune.seeds),
        final_cells=tuple(build_cell(tuned, seed) for seed in config.seeds),
    )


def _look_up(plain: Any, parts: Sequence[str]) -> Any:
    for part in parts:
        plain = plain[part]
    return plain


def shorten_keys(keys: Mapping[str, Any] | Sequence[str]) -> dict[str, str]:
    """Return key -> its last part, where no other key has the same; else the key itself."""
    count = Counter(key.split(".")[-1] for key in keys)
    return {key: key if count[key.split(".")[-1]] > 1 else key.split(".")[-1] for key in keys}


def _shorten_training(config: CellConfig, tune: TuneConfig) -> CellConfig:
    """Return the configuration of a tuning run: it keeps no weights; the share of warm-up stays with other steps."""
    train = replace(config.train, keep_checkpoints=[])
    if tune.steps is not None:
        warmup = round(train.warmup_steps * tune.steps / train.steps)
        train = replace(train, steps=tune.steps, warmup_steps=warmup)
    return replace(config, train=train)


def _refuse_equal_trials(arm: str, trials: Sequence[Trial]) -> None:
    seen: dict[str, Trial] = {}
    for trial in trials:
        twin = seen.setdefault(trial.cells[0].id, trial)
        if twin is not trial:
            raise UsageError(
                f"tune.grid: the trials '{twin.label}' and '{trial.label}' of {arm} are the same cells; leave one out"
            )
