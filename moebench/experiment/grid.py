"""Build the cells of an experiment: every arm for every seed, seeds outermost."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moebench.config import apply_overrides, cell_id, load_experiment
from moebench.errors import require_text, unknown
from moebench.experiment.arms import DEFAULT_RESOLUTION, Arm, Resolution, note_partial_overrides, resolve_arms
from moebench.experiment.seed_plan import SeedDesign, identify_settings
from moebench.experiment.sizes import apply_size, check_size, name_experiment
from moebench.experiment.stored_digests import choose_digest
from moebench.experiment.trials import Tuning, build_tuning
from moebench.file_access import require_plain_name
from moebench.plugin_errors import plugin_errors_in_one_line
from moebench.registry import Plugin, load_plugin, select_plugins
from moebench.runs.cell import Cell
from moebench.schema import DEFAULT_MARGIN, ExperimentConfig

BASELINE = "dense"
"""The baseline of `compare ROUTER...`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment and its cells, which have been checked."""

    name: str
    file: str
    question: str
    baseline: str
    cells: tuple[Cell, ...]
    """Seeds outermost, so that every prefix of the grid is a fair comparison."""
    notes: tuple[str, ...]
    """Lines for the user to read before training."""
    axes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Arm -> grid key -> label of the arm's value, without keys that mean nothing to the arm."""
    tuning: Tuning | None = None
    """What the arms try before they are trained; until they have chosen (`settle`), `cells` are those of the file."""
    margin: float = DEFAULT_MARGIN
    """Differences below this share of the baseline's mean count as equivalence."""
    tuning_of: str = ""
    """The experiment whose tuning runs the cells are; empty: they are to be reported."""
    design: SeedDesign | None = None
    """Seeds of the file, and how many undecided arms may get; None for tuning runs, which are not compared."""

    @property
    def arms(self) -> list[str]:
        """The arms in the order of the grid."""
        return list(dict.fromkeys(cell.arm for cell in self.cells))


def ignore_progress(number: int, total: int) -> None:
    """Show nothing."""


def expand(
    path: Path,
    overrides: Sequence[str] = (),
    plugins: Sequence[str] = (),
    on_progress: Callable[[int, int], None] = ignore_progress,
    finished_in: Path | None = None,
    results: Path | None = None,
) -> Experiment:
    """Read an experiment file and build its cells; raise UsageError if one could not be trained.

    `on_progress` is called with the number of arms that are checked and that of all arms. `finished_in`: a results
    folder; where data are missing, cells are those that were trained there. `results`: the folder of the runs that
    `init.from` names by the beginning of their ids; None: `finished_in`.
    """
    loaded = [load_plugin(plugin) for plugin in plugins]  # first: the file may use what they register
    config, cell_overrides = load_experiment(path, overrides)
    own_size = load_experiment(path)[0].size if config.size is not None else None
    config = apply_size(config, own_size, cell_overrides)
    is_regridded = any(override.startswith(("grid", "seeds")) for override in overrides)
    resolution = Resolution(
        on_progress=on_progress, find_digest=choose_digest(finished_in), results=results or finished_in
    )
    experiment = _build(path, config, cell_overrides, loaded, is_regridded=is_regridded, resolution=resolution)
    return replace(experiment, name=name_experiment(experiment.name, config.size, own_size))


def expand_routers(
    routers: Sequence[str], task: str, overrides: Sequence[str] = (), plugins: Sequence[str] = ()
) -> Experiment:
    """Build the experiment that compares routers with the dense model, everything else at its default."""
    loaded = [load_plugin(plugin) for plugin in plugins]
    arms = list(dict.fromkeys([BASELINE, *routers]))
    config = ExperimentConfig(
        question=f"How do {' and '.join(routers)} compare with a dense model on {task}?",
        base={"task": {"name": task}},
        grid={"router": arms},
        baseline=BASELINE,
    )
    return expand_config("-".join(["compare", *routers]), config, overrides, loaded)


def expand_config(
    name: str, config: ExperimentConfig, overrides: Sequence[str] = (), plugins: Sequence[Plugin] = ()
) -> Experiment:
    """Build the cells of an experiment that has no file."""
    config, cell_overrides = apply_overrides(config, overrides)
    config = apply_size(config, None, cell_overrides)
    experiment = _build(Path(name), config, cell_overrides, plugins, is_regridded=False)
    return replace(experiment, name=name_experiment(experiment.name, config.size, None))


def _build(
    path: Path,
    config: ExperimentConfig,
    cell_overrides: Mapping[str, Any],
    plugins: Sequence[Plugin],
    *,
    is_regridded: bool,
    resolution: Resolution = DEFAULT_RESOLUTION,
) -> Experiment:
    require_text(config.question, "question")
    require_text(config.baseline, "baseline")
    with plugin_errors_in_one_line():
        arms, arm_notes = resolve_arms(config, cell_overrides, str(path), resolution)
    check_size(config.size, [arm.config.task.name for arm in arms])
    baseline, notes = _choose_baseline(config.baseline, [arm.label for arm in arms], is_regridded=is_regridded)
    needed = {arm.label: select_plugins(plugins, _collect_names(arm.config)) for arm in arms}
    cells = [_build_cell(arm, seed, needed[arm.label]) for seed in config.seeds for arm in arms]
    tuning = None
    if config.tune.grid:
        with plugin_errors_in_one_line():
            tuning = build_tuning(config, arms, partial(_build_cell_of_trial, plugins))
    first = next(cell for cell in cells if cell.arm == baseline)
    return Experiment(
        name=require_plain_name(path.stem, f"{path}: name of the experiment, the file's without its ending"),
        file=str(path),
        question=config.question,
        baseline=baseline,
        cells=tuple(cells),
        axes={arm.label: arm.axes for arm in arms},
        tuning=tuning,
        design=SeedDesign(
            key=identify_settings(first),
            seeds=tuple(config.seeds),
            reserved=tuple(config.tune.seeds) if config.tune.grid else (),
        ),
        margin=config.margin,
        notes=(
            *arm_notes,
            *note_partial_overrides(cell_overrides, arms, config.grid),
            *_note_long_warmup(arms),
            *notes,
        ),
    )


def _note_long_warmup(arms: Sequence[Arm]) -> Iterator[str]:
    """Yield a note for each pair of steps and warm-up with which the learning rate never reaches its peak."""
    for steps, warmup in dict.fromkeys((arm.config.train.steps, arm.config.train.warmup_steps) for arm in arms):
        if warmup > steps:
            share = f"{steps / warmup:.0%} of train.learning_rate" if warmup < 2**63 else "its peak"
            yield f"train.warmup_steps={warmup} is more than train.steps={steps}: the rate never exceeds {share}"


def _build_cell(arm: Arm, seed: int, plugins: Sequence[Plugin]) -> Cell:
    config = replace(arm.config, seed=seed)
    return Cell(
        id=cell_id(config, arm.data_digest, [plugin.digest for plugin in plugins]),
        arm=arm.label,
        seed=seed,
        config=config,
        varies={**arm.varies, "seed": seed},
        plugins=tuple(str(plugin.file) for plugin in plugins),
        plugin_digests=tuple(plugin.digest for plugin in plugins),
        data_digest=arm.data_digest,
    )


def _build_cell_of_trial(plugins: Sequence[Plugin], arm: Arm, seed: int) -> Cell:
    return _build_cell(arm, seed, select_plugins(plugins, _collect_names(arm.config)))


def _collect_names(value: Any) -> Iterator[str]:
    """Yield all strings that may be names of components: string values, and keys of mappings."""
    if isinstance(value, str):
        yield value
    elif is_dataclass(value):
        for option in fields(value):
            yield from _collect_names(getattr(value, option.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _collect_names(item)
    elif isinstance(value, Mapping):
        yield from value
        yield from _collect_names(list(value.values()))


def _choose_baseline(requested: str | None, arms: Sequence[str], *, is_regridded: bool) -> tuple[str, tuple[str, ...]]:
    if requested is None or requested in arms:
        return requested or arms[0], ()
    if is_regridded:
        return arms[0], (f"baseline '{requested}' is not in this grid; '{arms[0]}' replaces it",)
    raise unknown("baseline", requested, arms)
